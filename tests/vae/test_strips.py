"""Convolutions over strips, against the oracles of the whole map."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from pack.nodes.vae import reference
from pack.nodes.vae.statistics import GroupStats, NormSiLU
from pack.nodes.vae.strips import Conv, Pointwise, ResBlock
from pack.testing.norm_parts import as_on_a_card
from pack.testing.strip_runs import (
    BOTH,
    C_IN,
    C_OUT,
    CUTS,
    TOLERANCE,
    WIDTH,
    assert_near,
    through,
    weights,
)
from pack.testing.vae_models import Arithmetic


@BOTH
@CUTS
@torch.inference_mode()
def test_convolution(dtype: torch.dtype, runs: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    weight, bias = weights(C_OUT, C_IN, 3, 3, dtype=dtype)
    with Arithmetic() as work:
        made = through(Conv(weight, bias, height=11), x, runs)
    assert_near(made, reference.convolution(x, weight, bias), dtype)
    # Beside the map's first and last row, the end of a strip makes one row too many.
    spare = 0 if len(runs) == 1 else 2
    assert 11 <= work.total / (WIDTH * weight.numel()) <= 11 + spare


@BOTH
@CUTS
@pytest.mark.parametrize("c_out", [C_IN, C_OUT])
@pytest.mark.parametrize("where", ["CPU", "card"])
def test_residual_block(dtype: torch.dtype, runs: list[int], c_out: int, where: str) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    norms = [tuple(torch.randn(c).to(dtype) for _ in range(2)) for c in (C_IN, c_out)]
    convs = [weights(c_out, c, 3, 3, dtype=dtype) for c in (C_IN, c_out)]
    shortcut = weights(c_out, C_IN, 1, 1, dtype=dtype) if c_out != C_IN else None
    across = None if shortcut is None else Pointwise(*shortcut)

    def conv(number: int, stats: GroupStats) -> Conv:
        norm = NormSiLU(stats.pooled(), *norms[number], eps=1e-6)
        return Conv(*convs[number], height=11, norm=norm)

    with as_on_a_card() if where == "card" else nullcontext():
        first, second = GroupStats(4, 1e-6), GroupStats(4, 1e-6)
        first.add(x)
        second.add(through(conv(0, first), x, runs))
        block = ResBlock(conv(0, first), conv(1, second), across, is_fresh=False)
        kept = x.clone()
        made = through(block, x, runs)
    wanted = reference.residual_block(x, norms, convs, shortcut, groups=4)
    assert made.shape == wanted.shape
    # Roundings of six steps add up.
    assert (made.double() - wanted).abs().max() < 3 * TOLERANCE[dtype] * wanted.abs().max()
    assert torch.equal(x, kept), "a stage wrote into what it was given"


def test_fresh_rows_are_normed_in_place() -> None:
    """A window of their size was held beside them; a skip that is added later stays as it is."""
    torch.manual_seed(4)
    x = torch.randn(1, C_IN, 11, WIDTH).contiguous(memory_format=torch.channels_last)
    stats = GroupStats(4, 1e-6)
    stats.add(x)
    norm = NormSiLU(stats.pooled(), torch.ones(C_IN), torch.zeros(C_IN), eps=1e-6)
    conv = Conv(*weights(C_IN, C_IN, 3, 3, dtype=torch.float32), height=11, norm=norm)
    for shortcut in (None, Pointwise(torch.ones(C_IN, C_IN, 1, 1), None)):
        given = x.clone()
        block = ResBlock(conv, conv, shortcut, is_fresh=True)
        through(block, given, [11], part=11)
        assert torch.equal(given, x) == (shortcut is None)
