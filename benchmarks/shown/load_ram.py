"""The table of `load_ram`."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import gib, grid
from ..rows import Row

WAYS = {
    "node": "Load Z-Image-Turbo",
    "mapped": "all shards mapped, then copied by ComfyUI",
}


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A line per way and folder."""
    body = [
        (
            WAYS[row["way"]], gib(row["folder_bytes"]), gib(row["peak_bytes"]),
            f"{row['peak_bytes'] / row['folder_bytes']:.2f}x", f"{row['seconds']:.0f} s",
        )
        for row in rows
    ]  # fmt: skip
    return {"load_ram": grid(("way", "folder", "peak RAM", "of the folder", "time"), body)}
