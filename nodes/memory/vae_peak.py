"""The peak of a decode or encode over strips as a formula, and its arithmetic."""

from __future__ import annotations

from .vae_plan import VaePlan, VaeSizes


def lean_vae_peak_bytes(
    sizes: VaeSizes, height: int, width: int, dtype_bytes: int, plan: VaePlan
) -> int:
    return 1


def lean_vae_work(sizes: VaeSizes, height: int, width: int, plan: VaePlan) -> int:
    return 1
