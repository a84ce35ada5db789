"""The table of `training_memory`."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import gib, grid
from ..rows import Row


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A line per way and picture."""
    body = [
        (
            row["way"], f"{row['width_px']}x{row['height_px']}, {row['layers']} main layers",
            gib(row["kept_bytes"]), gib(row["peak_bytes"]),
        )
        for row in rows
    ]  # fmt: skip
    return {"training_memory": grid(("way", "picture", "kept for backward", "peak"), body)}
