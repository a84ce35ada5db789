"""The tables of `vae_peak`: one for each VAE."""

from __future__ import annotations

from collections.abc import Sequence

from ..card.tables import mib
from ..rows import Row
from .lines import by_way

FLUX, WAN, WAN_22 = "Flux", "Wan 2.1", "Wan 2.2"
STOCK = "stock"
COLUMNS = {
    STOCK: "ComfyUI alone", "speed": "`speed`", "balance": "`balance` (default)",
    "smallest": "`smallest`",
}  # fmt: skip
BLOCKS = {"vae_peak_flux": FLUX, "vae_peak_wan": WAN, "vae_peak_wan22": WAN_22}


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """By block; only of VAEs that have rows."""
    return {
        name: by_way(
            ("picture or video",),
            COLUMNS,
            [row for row in rows if row["vae"] == vae],
            line=lambda row: (case(row),),
            way=lambda row: row["prefer"],
            cell=_cell,
        )
        for name, vae in BLOCKS.items()
        if any(row["vae"] == vae for row in rows)
    }


def case(row: Row) -> str:
    """The way and the picture or video."""
    text = f"{row['way']} {row['width_px']}x{row['height_px']}"
    if row["batch"] > 1:
        text += f", batch {row['batch']}"
    return text if row["frames"] == 1 else f"{text}, {row['frames']} frames"


def _cell(row: Row) -> str:
    text = mib(row["peak_bytes"])
    return text if row["prefer"] == STOCK else f"{text}, {row['arithmetic']:.2f}x"
