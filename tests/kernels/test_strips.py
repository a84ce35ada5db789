"""Convolutions over strips, against the oracles of the whole map."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pack.nodes.kernels import reference
from pack.nodes.kernels.group_stats import GroupStats, NormSiLU
from pack.nodes.kernels.strips import (
    Conv,
    DownConv,
    Halo,
    ResBlock,
    RowQueue,
    Stage,
    UpConv,
    upsampling_weight,
)

RUNS = {"one": [11], "rows": [1] * 11, "rest": [4, 4, 3], "uneven": [1, 7, 2, 1]}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
C_IN, C_OUT, WIDTH = 8, 12, 9
BOTH = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CUTS = pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)


def _weights(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor(shape[1:]).prod() ** -0.5
    return (torch.randn(shape) * scale).to(dtype), torch.randn(shape[0]).to(dtype)


def _through(stage: Stage, x: torch.Tensor, runs: list[int]) -> torch.Tensor:
    strips = [stage.push(rows) for rows in x.split(runs, 2)]
    return torch.cat([strip for strip in strips if strip is not None], 2)


def _assert_near(
    made: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1
) -> None:
    assert made.dtype == dtype
    assert made.shape == wanted.shape
    limit = roundings * TOLERANCE[dtype] * wanted.abs().max()
    assert (made.double() - wanted).abs().max() < limit


@pytest.fixture
def work() -> Iterator[list[int]]:
    yield []


@BOTH
@CUTS
def test_convolution(dtype: torch.dtype, runs: list[int], work: list[int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    weight, bias = _weights(C_OUT, C_IN, 3, 3, dtype=dtype)
    made = _through(Conv(weight, bias, height=11, tick=work.append), x, runs)
    _assert_near(made, reference.convolution(x, weight, bias), dtype)
    assert sum(work) == 11 * WIDTH * weight.numel()


@BOTH
@CUTS
@pytest.mark.parametrize("is_fused", [True, False])
def test_upsampling(dtype: torch.dtype, runs: list[int], is_fused: bool, work: list[int]) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    weight, bias = _weights(C_OUT, C_IN, 3, 3, dtype=dtype)
    stage = UpConv(weight, bias, height=11, tick=work.append, is_fused=is_fused)
    made = _through(stage, x, runs)
    wanted = reference.upsampled_convolution(x, weight, bias)
    _assert_near(made, wanted, dtype, 2 if is_fused else 1)
    assert sum(work) == 22 * 2 * WIDTH * C_IN * C_OUT * (4 if is_fused else 9)


@BOTH
@CUTS
@pytest.mark.parametrize("width", [9, 10])
def test_downsampling(dtype: torch.dtype, runs: list[int], width: int, work: list[int]) -> None:
    torch.manual_seed(2)
    weight, bias = _weights(C_OUT, C_IN, 3, 3, dtype=dtype)
    for height, cuts in ((11, runs), (12, [*runs, 1])):
        x = torch.randn(1, C_IN, height, width).to(dtype)
        made = _through(DownConv(weight, bias, height=height, tick=work.append), x, cuts)
        _assert_near(made, reference.downsampled_convolution(x, weight, bias), dtype)


@BOTH
@CUTS
@pytest.mark.parametrize("c_out", [C_IN, C_OUT])
def test_residual_block(dtype: torch.dtype, runs: list[int], c_out: int, work: list[int]) -> None:
    torch.manual_seed(3)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    norms = [tuple(torch.randn(c).to(dtype) for _ in range(2)) for c in (C_IN, c_out)]
    convs = [_weights(c_out, c, 3, 3, dtype=dtype) for c in (C_IN, c_out)]
    shortcut = _weights(c_out, C_IN, 1, 1, dtype=dtype) if c_out != C_IN else None

    def norm(stats: GroupStats, number: int) -> NormSiLU:
        return NormSiLU(*stats.pooled(), *norms[number], eps=1e-6)

    def conv(number: int, after: NormSiLU) -> Conv:
        return Conv(*convs[number], height=11, tick=work.append, write=after.write)

    first, second = GroupStats(4), GroupStats(4)
    first.add(x)
    second.add(_through(conv(0, norm(first, 0)), x, runs))
    block = ResBlock(conv(0, norm(first, 0)), conv(1, norm(second, 1)), shortcut, tick=work.append)
    kept = x.clone()
    made = _through(block, x, runs)
    wanted = reference.residual_block(x, norms, convs, shortcut, groups=4)
    assert made.shape == wanted.shape
    # Roundings of six steps add up.
    assert (made.double() - wanted).abs().max() < 3 * TOLERANCE[dtype] * wanted.abs().max()
    assert torch.equal(x, kept), "a stage wrote into what it was given"


def test_the_fused_weight_is_the_sum_of_taps() -> None:
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    fused = upsampling_weight(weight)[0, 0]
    assert fused.shape == (4, 4)
    assert fused.sum() == 4 * weight.sum()
    assert fused[0, 0] == weight[0, 0, 2, 2]
    assert fused[1, 2] == weight[0, 0, 1:3, 0:2].sum()


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
