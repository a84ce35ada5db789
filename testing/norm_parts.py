"""Plain twins of the parts of a batch norm that torch has on cards alone, for CPU and fake tensors.

Importing this file registers them. So launches can be counted on fake tensors of a card, and a
card's arithmetic can be tested on the CPU. The kernels themselves run on a card only. The twins
compute what aten/src/ATen/native/cuda/Normalization.cuh of torch computes, in its precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

_PARTS = torch.library.Library("aten", "IMPL")
Pair = tuple[torch.Tensor, torch.Tensor]


def stats(rows: torch.Tensor, eps: float) -> Pair:
    """Mean and inverse deviation of each channel, float32."""
    variance, mean = torch.var_mean(rows.float(), dim=(0, 2, 3), correction=0)
    spread = torch.where((variance == 0) & (eps == 0), 0.0, (variance + eps).rsqrt())
    return mean, spread


def gathered(
    like: torch.Tensor, mean: torch.Tensor, spread: torch.Tensor, running_mean: None,
    running_var: None, momentum: float, eps: float, counts: torch.Tensor,
) -> Pair:  # fmt: skip
    """Those of the samples [N, C] together, one after the other as the kernel does."""
    average, sum_of_squares = torch.zeros_like(mean[0]), torch.zeros_like(mean[0])
    number = 0.0
    for count, one, deviation in zip(counts, mean, spread, strict=True):
        within = ((1 / deviation).square() - eps) * count
        factor = 1 / (number + count)
        sum_of_squares += within + (average - one).square() * number * count * factor
        average = number * factor * average + count * factor * one
        number += float(count)
    return average, (sum_of_squares / number + eps).rsqrt()


def normed(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
    spread: torch.Tensor, eps: float,
) -> torch.Tensor:  # fmt: skip
    """The normed strip, computed in float32."""
    weight, bias, mean, spread = (v.float()[:, None, None] for v in (weight, bias, mean, spread))
    return (weight * (rows.float() - mean) * spread + bias).to(rows.dtype)


def normed_out(*args: object, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(normed(*args))  # type: ignore


def _fake_stats(rows: torch.Tensor, eps: float) -> Pair:
    one, two = (rows.new_empty(rows.shape[1], dtype=torch.float32) for _ in range(2))
    return one, two


def _fake_gathered(like: torch.Tensor, mean: torch.Tensor, *rest: object) -> Pair:
    return mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])


_PARTS.impl("batch_norm_stats", stats, "CPU")
_PARTS.impl("batch_norm_stats", _fake_stats, "Meta")
_PARTS.impl("batch_norm_gather_stats_with_counts", gathered, "CPU")
_PARTS.impl("batch_norm_gather_stats_with_counts", _fake_gathered, "Meta")
_PARTS.impl("batch_norm_elemt", normed, "CPU")
_PARTS.impl("batch_norm_elemt", lambda rows, *rest: torch.empty_like(rows), "Meta")
_PARTS.impl("batch_norm_elemt.out", normed_out, "CPU")
_PARTS.impl("batch_norm_elemt.out", lambda *args, out: out, "Meta")


@contextmanager
def as_on_a_card() -> Iterator[None]:
    """The CPU's maps are normed as a card's are."""
    from pack.nodes.vae import statistics

    with mock.patch.object(statistics, "has_norm_parts", lambda device: True):
        yield
