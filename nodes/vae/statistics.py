"""Group norm of a map that comes in strips of rows: statistics first, then the strips.

A strip is [1, C, n, W], n rows of a map [1, C, H, W]; the strips of a map come in order. Where
torch has the parts of a batch norm (see `devices`), a strip's statistics, the pooling of all
strips' and the norm of a strip are one operation each, and the CPU waits for none:

| torch | gives |
|---|---|
| batch_norm_stats | mean and inverse deviation of each channel: Welford's formula, in float32 |
| batch_norm_gather_stats_with_counts | those of several: Chan's formula, one after the other |
| batch_norm_elemt | (x - mean) * inverse deviation * weight + bias: float32, rounded once |

Source: its aten/src/ATen/native/cuda/Normalization.cuh. The channels of a group are pooled as parts
of one channel: one after the other, by one block of threads for all groups. What that costs where
strips are many, and in float64, is not measured on a card. Pooling in float32 adds rounding errors
that half types hide; a map in float32 is pooled in float64. For a tall channels-last strip, the
first operation may clear a small buffer too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from .devices import has_norm_parts

# The CPU's norm sums so many elements of a channel in float32 without a visible error.
PIECE_PIXELS = 2**12
# Pixels that are normed at a time where the normed rows are a tensor of their own.
NORM_PIXELS = 2**15
# The weights of strips in a map's statistics, by what decides them.
Weights = dict["tuple[torch.device, torch.dtype, int, tuple[int, ...]]", torch.Tensor]


class Moments(NamedTuple):
    """Statistics of a map's groups, for each channel, [C], float32, on the device of the map.

    mean: of the channel's group.
    spread: the group's biased variance; where torch has the parts of a batch norm, 1 over the root
        of it and eps.
    """

    mean: torch.Tensor
    spread: torch.Tensor


class GroupStats:
    """Mean and variance of each channel group over all strips that were added.

    Pooled by Chan, Golub and LeVeque's formula: the variances within the strips, and the spread of
    the strips' means around the mean of all.

    Args:
        groups: of channels.
        eps: what the norm adds to the variance.
        weights: of strips, kept for other maps that are cut alike.

    Memory: two vectors per strip, of C elements or of `groups`; `add` holds what `moments` holds.
    Exact: equal up to rounding to the statistics of the whole map; pooled in float64, for half
        types in float32 where torch has the parts of a batch norm.
    """

    def __init__(self, groups: int, eps: float, weights: Weights | None = None) -> None:
        if groups < 1:
            raise ValueError(f"groups must be >= 1, got {groups}")
        self._groups, self._eps, self._channels = groups, eps, 0
        self._dtype = torch.float32
        self._weights = {} if weights is None else weights
        self._parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._counts: list[int] = []

    def add(self, rows: torch.Tensor) -> None:
        """Adds a strip, [1, C, n, W], float; nothing of it is kept."""
        _, self._channels, count, _ = rows.shape
        self._counts.append(count)
        has_parts = has_norm_parts(rows.device)
        self._parts.append(
            torch.batch_norm_stats(rows, self._eps) if has_parts else moments(rows, self._groups)
        )
        self._dtype = rows.dtype

    def pooled(self) -> Moments:
        """The statistics of all strips.

        Raises:
            ValueError: nothing was added.
        """
        if not self._parts:
            raise ValueError("no strip was added")
        device, of_group = self._parts[0][0].device, self._channels // self._groups
        if has_norm_parts(device):
            mean, spread = self._gathered(device, of_group)
        else:
            mean, spread = _pooled(self._parts, self._counts, self._groups)
        # [G] -> [C], in one launch with the cast
        mean, spread = (
            torch.empty(self._channels, dtype=torch.float32, device=device)
            .view(-1, of_group)
            .copy_(vector[:, None])
            .flatten()
            for vector in (mean, spread)
        )
        return Moments(mean, spread)

    def _gathered(self, device: torch.device, of_group: int) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = torch.float64 if self._dtype == torch.float32 else torch.float32
        # [C] -> [G, C / G] for each strip; then the channels of a group are its samples.
        each = [v.view(self._groups, -1) for v in (*self._column(0), *self._column(1))]
        pair = torch.cat(each, 1).to(dtype).chunk(2, 1) if len(each) > 2 else each
        means, spreads = (v.to(dtype) for v in pair)
        cut = device, dtype, of_group, tuple(self._counts)
        if cut not in self._weights:
            counts = torch.tensor(self._counts, dtype=dtype).repeat_interleave(of_group)
            self._weights[cut] = counts.to(device, non_blocking=True)
        return torch.batch_norm_gather_stats_with_counts(
            means, means.T, spreads.T, None, None, 0.0, self._eps, self._weights[cut]
        )

    def _column(self, number: int) -> list[torch.Tensor]:
        return [part[number] for part in self._parts]


def _pooled(
    parts: list[tuple[torch.Tensor, torch.Tensor]], counts: list[int], groups: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each group, [groups], float64, from those of its channels."""
    # On the CPU: Apple GPUs have no float64.
    means, variances = (
        torch.stack(column).cpu().double().unflatten(1, (groups, -1))
        for column in zip(*parts, strict=True)
    )
    weights = torch.tensor(counts, dtype=torch.float64)[:, None, None]
    weights /= sum(counts) * means.shape[2]
    mean = (weights * means).sum((0, 2), keepdim=True)
    variance = (weights * (variances + (means - mean).square())).sum((0, 2))
    return mean.flatten(), variance


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
        mean, variance = _pooled(parts, [piece.shape[2] for piece in pieces], groups)
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
        moments: of the whole map.
        weight: [C], float.
        bias: [C], float.
        eps: added to the variance.

    Memory: where torch has no parts of a batch norm, a call holds `NORM_PIXELS` normed besides.
    Exact: rounds where the host's two modules do: after the norm and after SiLU.
    """

    def __init__(
        self, moments: Moments, weight: torch.Tensor, bias: torch.Tensor, *, eps: float
    ) -> None:
        self._mean, self._spread = moments
        self._has_parts, self._eps = has_norm_parts(weight.device), eps
        self._weight, self._bias = (
            (weight, bias) if self._has_parts else (weight.float(), bias.float())
        )

    def norm(self, rows: torch.Tensor) -> torch.Tensor:
        """The normed strip, of the dtype of rows [1, C, n, W]."""
        vectors = self._weight, self._bias, self._mean, self._spread
        if self._has_parts:
            return torch.batch_norm_elemt(rows, *vectors, self._eps)
        weight, bias, mean, variance = vectors
        return functional.batch_norm(rows, mean, variance, weight, bias, False, 0.0, self._eps)

    def write(self, parts: list[torch.Tensor], into: torch.Tensor) -> None:
        """Writes SiLU of the normed rows of several strips into one, which may be the only one.

        Empties the list.
        """
        done = 0
        while parts:
            rows = parts.pop(0)
            given = into[:, :, done : done + rows.shape[2]]
            done += rows.shape[2]
            if self._has_parts:
                vectors = self._weight, self._bias, self._mean, self._spread
                torch.ops.aten.batch_norm_elemt.out(rows, *vectors, self._eps, out=given)
                continue
            count = max(1, NORM_PIXELS // rows.shape[3])
            for few, into_few in zip(rows.split(count, 2), given.split(count, 2), strict=True):
                torch.ops.aten.silu.out(self.norm(few), out=into_few)
        if self._has_parts:
            functional.silu(into, inplace=True)
