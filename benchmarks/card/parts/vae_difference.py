"""How far a VAE's result is from the host's, in figures of a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...vae_measures import seam_ratio

FIGURES = (
    "is_bit_equal", "largest_error", "relative_error", "equal_8bit", "most_off_8bit", "psnr_db",
    "seam_energy",
)  # fmt: skip


def latent_difference(made: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """The first three of `FIGURES`, for tensors of one shape, float32, on the CPU."""
    error, size = made - wanted, float(wanted.norm())
    return {
        "is_bit_equal": torch.equal(made, wanted),
        "largest_error": float(error.abs().max()),
        "relative_error": float(error.norm()) / size if size else None,
    }


def picture_difference(
    made: torch.Tensor, wanted: torch.Tensor, *, edges: Sequence[int], is_tiled: bool
) -> dict[str, Any]:
    """All of `FIGURES`.

    equal_8bit: share of the values that SaveImage writes alike. most_off_8bit: by how much the
    others differ at most. psnr_db: None where all are equal. seam_energy: mean square of the error
    near the edges over that elsewhere; None without edges.

    Args:
        made: a square picture, [1, H, W, 3], float32, 0 to 1, on the CPU.
        wanted: the host's, likewise.
        edges: rows at which tiles or strips end.
        is_tiled: columns too.
    """
    error = made - wanted
    mean_square = float(error.double().square().mean())
    off = (as_saved(made).short() - as_saved(wanted).short()).abs()
    return latent_difference(made, wanted) | {
        "equal_8bit": float((off == 0).double().mean()),
        "most_off_8bit": int(off.max()),
        "psnr_db": -10 * math.log10(mean_square) if mean_square else None,
        "seam_energy": seam_ratio(error[0], list(edges), both=is_tiled),
    }


def as_saved(pictures: torch.Tensor) -> torch.Tensor:
    """The 8-bit values that the host's SaveImage writes: it cuts off, it does not round."""
    return (255.0 * pictures).clamp(0, 255).to(torch.uint8)


def clamped(pictures: torch.Tensor) -> float:
    """Share of the values that are black or white."""
    return float(((pictures <= 0) | (pictures >= 1)).double().mean())
