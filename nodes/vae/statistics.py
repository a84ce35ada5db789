"""Group norm of a map that comes in strips of rows: statistics first, then the strips.

A strip is [1, C, n, W], n rows of a map [1, C, H, W]; the strips of a map come in order.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# The CPU's norm sums so many elements of a channel in float32 without a visible error.
PIECE_PIXELS = 2**12


class GroupStats:
    """Mean and variance of each channel group over all strips that were added.

    Pooled by Chan, Golub and LeVeque's formula: the variances within the strips, and the spread of
    the strips' means around the mean of all.

    Memory: two vectors of `groups` elements per strip; `add` holds what `moments` holds.
    Exact: equal up to rounding to the statistics of the whole map; pooled in float64.
    """

    def __init__(self, groups: int) -> None:
        if groups < 1:
            raise ValueError(f"groups must be >= 1, got {groups}")
        self._groups = groups
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._counts: list[int] = []

    def add(self, rows: torch.Tensor) -> None:
        """Adds a strip, [1, C, n, W], float; nothing of it is kept."""
        self._parts.append(moments(rows, self._groups))
        self._counts.append(rows.numel() // self._groups)

    def pooled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance of each group, [groups], float64, on the CPU.

        Raises:
            ValueError: nothing was added.
        """
        if not self._parts:
            raise ValueError("no strip was added")
        return _pooled(self._parts, self._counts)


def _pooled(
    parts: list[tuple[torch.Tensor, torch.Tensor]], counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    # One copy from the device for the whole map.
    means, variances = (torch.stack(column).cpu().double() for column in zip(*parts, strict=True))
    weights = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
    mean = (weights * means).sum(0)
    return mean, (weights * (variances + (means - mean).square())).sum(0)


def moments(rows: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each group of a strip, [groups], float32.

    Args:
        rows: [1, C, n, W], float.
        groups: divides C.

    Memory: on the CPU a float32 copy of about `PIECE_PIXELS` of the strip, of a half type two;
        elsewhere none for half types.
    Exact: equal up to rounding, in float32.
    """
    if rows.device.type == "cpu":
        # The norm below adds rounded numbers one by one: its error grows with the pixels.
        pieces = rows.split(max(1, PIECE_PIXELS // rows.shape[3]), 2)
        parts = [_moments_by_norm(piece, groups) for piece in pieces]
        mean, variance = _pooled(parts, [piece.shape[2] for piece in pieces])
        return mean.float(), variance.float()
    if rows.dtype == torch.float32:
        variance, mean = torch.var_mean(_grouped(rows, groups), dim=(0, 2, 3, 4), correction=0)
        return mean, variance
    return moments_by_sums(rows, groups)


def _moments_by_norm(rows: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    # The fused norm is the one reduction over channels-last groups that is fast on the CPU.
    _, channels, height, width = rows.shape
    rows = rows.float().contiguous(memory_format=torch.channels_last)
    _, mean, inverse = torch.native_group_norm(
        rows, None, None, 1, channels, height * width, groups, 0.0
    )
    # 1 / infinity is the variance of a constant group.
    return mean[0], inverse[0].reciprocal().square()


def moments_by_sums(rows: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `moments`, by two sums in float32: without a float32 copy where the device has none.

    Exact: cancellation costs (mean / deviation)**2 roundings of float32: for half types only.
    """
    grouped = _grouped(rows, groups)
    count, dims = rows.numel() // groups, (0, 2, 3, 4)
    mean = grouped.sum(dims, dtype=torch.float32) / count
    length = torch.linalg.vector_norm(grouped, dim=dims, dtype=torch.float32)
    return mean, (length.square() / count - mean.square()).clamp_(min=0)


def _grouped(rows: torch.Tensor, groups: int) -> torch.Tensor:
    return rows.unflatten(1, (groups, -1))  # [1, C, n, W] -> [1, G, C / G, n, W]


class NormSiLU:
    """Group norm with given statistics, then SiLU, as before each convolution.

    Args:
        mean: of each group of the whole map, [groups], float.
        variance: likewise, biased.
        weight: [C], float.
        bias: [C], float.
        eps: added to the variance.

    Memory: a call holds the normed strip beside the two it is given.
    Exact: rounds where the host's two modules do: after the norm and after SiLU.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        variance: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        *,
        eps: float,
    ) -> None:
        per_group = weight.shape[0] // mean.shape[0]
        vectors = (mean.repeat_interleave(per_group), variance.repeat_interleave(per_group))
        # Apple GPUs have no float64.
        self._mean, self._variance = (v.float().to(weight.device) for v in vectors)
        self._weight, self._bias, self._eps = weight.float(), bias.float(), eps

    def norm(self, rows: torch.Tensor) -> torch.Tensor:
        """The normed strip, of the dtype of rows [1, C, n, W]."""
        return functional.batch_norm(
            rows, self._mean, self._variance, self._weight, self._bias, False, 0.0, self._eps
        )

    def write(self, rows: torch.Tensor, into: torch.Tensor) -> None:
        """Writes SiLU of the normed strip into a strip of the same shape."""
        torch.ops.aten.silu.out(self.norm(rows), out=into)
