"""The table of `diffusers_peak`."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import mib
from ..rows import Row
from .lines import by_way, picture

COLUMNS = {
    "diffusers": "diffusers",
    "enable_gradient_checkpointing()": "`enable_gradient_checkpointing()`",
    'set_attention_slice("max")': '`set_attention_slice("max")`',
}


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A line per picture."""
    return {
        "diffusers_peak": by_way(
            ("picture",),
            COLUMNS,
            rows,
            line=lambda row: (picture(row),),
            way=lambda row: row["variant"],
            cell=lambda row: mib(row["peak_bytes"]),
        )
    }
