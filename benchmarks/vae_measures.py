"""What vae_compare tells of a result: growth of the process, seams, error maps, 8-bit pixels."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch

NEAR_PX = 4


def seam_ratio(error: torch.Tensor, edges: list[int], *, both: bool) -> float | None:
    """Mean square of the error near the edges over that elsewhere; None without edges.

    Args:
        error: of a picture [H, W, 3] or a video [T, H, W, 3].
        both: the edges are columns too, not rows alone.
    """
    square = error.square().mean(-1)
    near = torch.zeros(square.shape[-2:], dtype=torch.bool)
    for edge in edges:
        near[max(0, edge - NEAR_PX) : edge + NEAR_PX] = True
        if both:
            near[:, max(0, edge - NEAR_PX) : edge + NEAR_PX] = True
    if not near.any() or near.all() or not square.any():
        return None
    return float(square[..., near].mean() / square[..., ~near].mean())


def keep_map(error: torch.Tensor, path: Path) -> None:
    """Keeps the largest error of each pixel as a grey picture; white is the map's own maximum.

    Args:
        error: of a picture [H, W, 3].
    """
    from PIL import Image

    grey = error.abs().amax(-1)
    scaled = (255 * grey / grey.max().clamp(min=1e-12)).round()
    Image.fromarray(scaled.numpy().astype(np.uint8)).save(path, optimize=True)


def unequal(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """The share of pixels that differ after 8 bits, and by how much at most."""
    off = ((one.double() * 255).round() - (two.double() * 255).round()).abs().amax(-1)
    return float((off > 0).double().mean()), float(off.max())


class PeakProcess:
    """Growth of the process' resident memory at its peak; Linux only."""

    def __enter__(self) -> PeakProcess:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._start = self._kib("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.nbytes = 1024 * (self._kib("VmHWM") - self._start)

    @staticmethod
    def _kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))
