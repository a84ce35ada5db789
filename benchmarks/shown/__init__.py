"""The tables of the stored rows: each script's file has `tables(rows)`, by the name of the table.

Used by the script of the same name after it ran, and by benchmarks.documents. Standard library and
the pack's torch-free files only, so that neither torch nor a host is needed.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

SCRIPTS = (
    "denoiser_peak", "added_peak", "diffusers_peak", "families", "launches", "block_time",
    "training_memory", "vae_peak", "vae_compare", "fit_table", "plan_accuracy", "probe_overhead",
    "load_ram", "vram_chart",
)  # fmt: skip


def scripts() -> dict[str, ModuleType]:
    """The file of each script."""
    return {name: import_module(f"{__name__}.{name}") for name in SCRIPTS}
