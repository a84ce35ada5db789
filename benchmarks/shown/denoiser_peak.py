"""The tables of `denoiser_peak`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..card.tables import grid, mib
from ..rows import Row
from .lines import by_way, picture

STOCK, CHECKPOINT = "stock", "torch.utils.checkpoint around it"
DEFAULT, BLOCK_LEVEL = "balance (default)", "balance, block level"
COLUMNS = {
    STOCK: "ComfyUI alone", CHECKPOINT: "with `torch.utils.checkpoint`", "speed": "`speed`",
    DEFAULT: "`balance` (default)", "smallest": "`smallest`",
    BLOCK_LEVEL: "`balance`, blocks alone, under ComfyUI's forward",
}  # fmt: skip
CALLED, APPLIED, RESERVED = "model", "apply", "reserve"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The peaks by each route, and what ComfyUI keeps free for the call."""
    return {
        "denoiser_peak": _peaks(row for row in rows if row["route"] == CALLED),
        "denoiser_peak_applied": _peaks(row for row in rows if row["route"] == APPLIED),
        "denoiser_reserve": _reserves([row for row in rows if row["route"] == RESERVED]),
    }


def _peaks(rows: Iterable[Row]) -> str:
    mine = list(rows)
    measured = {row["variant"] for row in mine}
    return by_way(
        ("picture", "residual stream"),
        {name: head for name, head in COLUMNS.items() if name in measured},
        mine,
        line=lambda row: (picture(row), mib(row["stream_bytes"])),
        way=lambda row: row["variant"],
        cell=lambda row: mib(row["peak_bytes"]),
    )


def _reserves(rows: Sequence[Row]) -> str:
    body = [(picture(row), mib(row["own_bytes"], 0), mib(row["reserve_bytes"], 0)) for row in rows]
    return grid(("picture", "ComfyUI's own estimate", "with Apply Gradient Checkpoint"), body)
