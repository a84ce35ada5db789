"""Where each figure comes from that stands in the prose of a document."""

from __future__ import annotations

import re
from typing import NamedTuple

from pack.nodes.denoiser.cost import LAUNCH_S, WAITING
from pack.nodes.denoiser.products import BALANCE_COPY, ELEMENT_BITS, LEAST_COPY, SPEED_COPY
from pack.nodes.units import MIB


class Cell(NamedTuple):
    """A cell of a table that benchmarks.documents makes.

    line: cells that the one line of that table has.
    """

    table: str
    line: tuple[str, ...]
    column: str


AT_2048, AT_4096 = ("2048x2048",), ("4096x4096",)
QUOTED = {
    "467.4 MiB": Cell("denoiser_peak", AT_2048, "`balance` (default)"),
    "1921.5 MiB": Cell("denoiser_peak", AT_2048, "ComfyUI alone"),
    "1177.0 MiB": Cell("vae_peak_flux", ("decode 2048x2048",), "`balance` (default)"),
    "5186.0 MiB": Cell("vae_peak_flux", ("decode 2048x2048",), "ComfyUI alone"),
    "7.75 GiB": Cell("vram_least", AT_2048, "ComfyUI alone"),
    "1.93 GiB": Cell("vram_least", AT_2048, "`prefer` balance"),
    "30.36 GiB": Cell("vram_least", AT_4096, "ComfyUI alone"),
    "6.72 GiB": Cell("vram_least", AT_4096, "`prefer` balance"),
    "537.1 MiB": Cell("fit_table", ("smallest budget that fits",), "1024x1024"),
    "0.02 %": Cell("probe_overhead", ("steps", "128x128"), "of the step"),
    "1.35 %": Cell("probe_overhead", ("blocks", "128x128"), "of the step"),
    "1.04x": Cell("load_ram", ("Load Z-Image-Turbo",), "of the folder"),
}


def _copied(elements: int) -> str:
    return f"{elements * ELEMENT_BITS // 8 // MIB} MiB"


# What is no measurement, and why.
SETTINGS = {
    r"\d{1,2} GiB": "the memory of a card or of a computer, a budget, disk space",
    r"11\.5 GiB|7\.5 GiB|0\.3 GiB": "sizes of the published files",
    r"\d{1,2} GB": "disk space",
    "80 %": "of a PCIe link's rate, in the cost model",
    "100 %|150 %": "a zoom of the page",
    f"{100 * WAITING:.0f} %": "WAITING of the cost model",
    f"{1e6 * LAUNCH_S:.0f} us": "LAUNCH_S of the cost model",
    "|".join(map(_copied, (SPEED_COPY, BALANCE_COPY, LEAST_COPY))): "limits of a copy, products.py",
}


def is_setting(figure: str) -> bool:
    return any(re.fullmatch(pattern, figure) for pattern in SETTINGS)
