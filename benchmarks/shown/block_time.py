"""The table of `block_time`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..card.tables import NOT_MEASURED, grid
from ..rows import Row

COLUMNS = {
    "speed": "`speed`", "balance (default)": "`balance` (default)",
    "3 groups (Slice auto)": "3 groups (Slice auto)", "smallest": "`smallest`",
}  # fmt: skip


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A line per number of tokens: each variant's time as a multiple of ComfyUI's."""
    body = []
    for tokens in sorted({row["tokens"] for row in rows}):
        mine = {row["variant"]: row for row in rows if row["tokens"] == tokens}
        stock = statistics.median(row["stock_seconds"] for row in mine.values())
        body.append([f"{tokens}", f"{stock:.2f} s", *(_cell(mine.get(name)) for name in COLUMNS)])
    return {"block_time": grid(("tokens", "ComfyUI", *COLUMNS.values()), body)}


def _cell(row: Row | None) -> str:
    """A variant's ratio, its range and its pairs."""
    if row is None:
        return NOT_MEASURED
    text = f"{row['ratio']:.2f}x"
    if row["pairs"] > 1:
        text += f" ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}, {row['pairs']} pairs)"
    else:
        text += " (1 pair)"
    return text if row["is_bit_equal"] else f"{text}, not bit-equal"
