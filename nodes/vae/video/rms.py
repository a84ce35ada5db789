"""The RMS norm of each position over its channels, and SiLU."""

from __future__ import annotations

import torch
from torch.nn import functional

from .layers import RmsLayer

# What torch's `normalize` takes at least for the length of a vector.
EPS = 1e-12


class RmsSiLU:
    """The norm, then SiLU, as before each convolution.

    Memory: a call holds the lengths: one element per position.
    Exact: bit for bit as the host's two modules, whose operations it repeats in place.
    """

    def __init__(self, layer: RmsLayer) -> None:
        self._gamma, self._scale = layer.gamma, layer.scale

    def norm(self, rows: torch.Tensor) -> torch.Tensor:
        """The normed rows [1, C, n, W], without SiLU."""
        made = torch.empty_like(rows)
        self._norm(rows, made)
        return made

    def write(self, parts: list[torch.Tensor], into: torch.Tensor) -> None:
        """Writes SiLU of the normed rows of several strips into one; empties the list."""
        done = 0
        while parts:
            rows = parts.pop(0)
            self._norm(rows, into[:, :, done : done + rows.shape[2]])
            done += rows.shape[2]
        functional.silu(into, inplace=True)

    def _norm(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        # torch.nn.functional.normalize, and the host's two products: each rounds once.
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min_(EPS)
        torch.div(rows, length, out=into)
        into.mul_(self._scale).mul_(self._gamma.to(into))
