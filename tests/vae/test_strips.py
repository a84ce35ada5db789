"""Convolutions over strips, against the oracles of the whole map."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.vae import reference
from pack.nodes.vae.statistics import GroupStats, NormSiLU
from pack.nodes.vae.strips import Conv, Halo, Pointwise, ResBlock, RowQueue
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
    assert work.total == 11 * WIDTH * weight.numel()


@BOTH
@CUTS
@pytest.mark.parametrize("c_out", [C_IN, C_OUT])
def test_residual_block(dtype: torch.dtype, runs: list[int], c_out: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    norms = [tuple(torch.randn(c).to(dtype) for _ in range(2)) for c in (C_IN, c_out)]
    convs = [weights(c_out, c, 3, 3, dtype=dtype) for c in (C_IN, c_out)]
    shortcut = weights(c_out, C_IN, 1, 1, dtype=dtype) if c_out != C_IN else None
    across = None if shortcut is None else Pointwise(*shortcut)

    def norm(stats: GroupStats, number: int) -> NormSiLU:
        return NormSiLU(*stats.pooled(), *norms[number], eps=1e-6)

    def conv(number: int, after: NormSiLU) -> Conv:
        return Conv(*convs[number], height=11, write=after.write)

    first, second = GroupStats(4), GroupStats(4)
    first.add(x)
    second.add(through(conv(0, norm(first, 0)), x, runs))
    block = ResBlock(conv(0, norm(first, 0)), conv(1, norm(second, 1)), across)
    kept = x.clone()
    made = through(block, x, runs)
    wanted = reference.residual_block(x, norms, convs, shortcut, groups=4)
    assert made.shape == wanted.shape
    # Roundings of six steps add up.
    assert (made.double() - wanted).abs().max() < 3 * TOLERANCE[dtype] * wanted.abs().max()
    assert torch.equal(x, kept), "a stage wrote into what it was given"


def test_a_queue_lets_go_of_what_was_taken() -> None:
    import weakref

    queue, strip = RowQueue(), torch.ones(1, 2, 6, 3)
    seen = weakref.ref(strip)
    queue.put(strip)
    del strip
    rows = torch.zeros(1, 2, 4, 3)
    queue.add_to_(rows)
    assert rows.eq(1).all()
    assert queue.rows == 2
    assert seen() is None, "two rows keep the whole strip"
    with pytest.raises(ValueError, match="4 rows are wanted, 2 wait"):
        queue.add_to_(rows)


def test_a_map_has_no_more_rows_than_it_has() -> None:
    halo = Halo(3)
    assert halo.window(torch.ones(1, 2, 1, 5)) is None
    with pytest.raises(ValueError, match="the map has 1 rows less than it was given"):
        halo.window(torch.ones(1, 2, 3, 5))
