"""The table of `added_peak`."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import mib
from ..rows import Row
from .lines import by_way, picture

COLUMNS = {
    "ComfyUI alone": "ComfyUI alone", "speed": "`speed`",
    "balance (default)": "`balance` (default)",
}  # fmt: skip


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A line per picture and addition."""
    return {
        "added_peak": by_way(
            ("picture", "added"),
            COLUMNS,
            rows,
            line=lambda row: (picture(row), row["added"]),
            way=lambda row: row["way"],
            cell=lambda row: mib(row["peak_bytes"]),
        )
    }
