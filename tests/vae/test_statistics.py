"""Group norm over strips, against its oracle and the statistics of the whole map."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from pack.nodes.vae import reference
from pack.nodes.vae.statistics import GroupStats, NormSiLU, Weights, moments, moments_by_sums
from pack.testing.norm_parts import as_on_a_card

RUNS = {"one": [13], "rows": [1] * 13, "rest": [5, 5, 3]}
EPS = 1e-6
WHERE = pytest.mark.parametrize("where", ["CPU", "card"])
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def _map(dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    torch.manual_seed(0)
    # Rows differ in mean and spread, so the term between strips counts.
    slope = torch.linspace(-3, 5, 13)[:, None]
    x = torch.randn(1, 24, 13, 7) * (1 + slope.abs()) + slope
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@WHERE
def test_statistics_are_those_of_the_whole_map(
    dtype: torch.dtype, layout: torch.memory_format, runs: list[int], where: str
) -> None:
    """Where it says card: by twins of torch's kernels, which only cards have."""
    x = _map(dtype, layout)
    with as_on_a_card() if where == "card" else nullcontext():
        stats = GroupStats(6, EPS)
        for rows in x.split(runs, 2):
            stats.add(rows)
        mean, variance = stats.pooled()
    if where == "card":
        variance = variance.pow(-2) - EPS
    assert mean.dtype == variance.dtype == torch.float32
    for vector in (mean, variance):  # each channel has its group's
        assert torch.equal(vector.view(6, 4), vector.view(6, 4)[:, :1].expand(-1, 4))
    mean, variance = (vector.view(6, 4)[:, 0].double() for vector in (mean, variance))
    grouped = x.double().unflatten(1, (6, -1)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, grouped.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(variance, grouped.var(1, correction=0), rtol=1e-5, atol=1e-6)
    if len(runs) > 1:  # without the term between strips it would be another number
        parts = [p.double().unflatten(1, (6, -1)) for p in x.split(runs, 2)]
        within = sum(p.var((2, 3, 4), correction=0)[0] * p.shape[3] for p in parts) / 13
        assert ((within - variance).abs() > 0.01 * variance).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_both_ways_to_the_moments_agree(dtype: torch.dtype) -> None:
    x = _map(dtype, torch.channels_last)
    for one, two in zip(moments(x, 4), moments_by_sums(x, 4), strict=True):
        assert one.dtype == two.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    assert moments(torch.ones(1, 8, 3, 5, dtype=dtype), 2)[1].max() < 1e-6


@pytest.mark.parametrize("height", [16, 128, 131])
def test_the_error_does_not_grow_with_the_strip(height: int) -> None:
    """The CPU's norm over channels-last groups is off by 3e-5 at 128 x 1024 pixels in one piece."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, height, 1024) + 0.5
    mean, variance = moments(x.contiguous(memory_format=torch.channels_last), 4)
    grouped = x.double().unflatten(1, (4, -1)).movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean.double(), grouped.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance.double(), grouped.var(1, correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@WHERE
def test_norm_and_silu_equal_the_oracle(dtype: torch.dtype, where: str) -> None:
    x = _map(dtype, torch.channels_last)
    weight, bias = (torch.randn(24).to(dtype) for _ in range(2))
    with as_on_a_card() if where == "card" else nullcontext():
        stats = GroupStats(6, EPS)
        stats.add(x)
        norm = NormSiLU(stats.pooled(), weight, bias, eps=EPS)
        made, in_place = torch.empty_like(x), x.clone()
        norm.write(list(x.split(4, 2)), made)
        norm.write([in_place], in_place)
        assert torch.equal(in_place, made)
    assert made.dtype == dtype
    wanted = reference.group_norm_silu(x, weight, bias, groups=6)
    limit = 2 * TOLERANCE[dtype] * wanted.abs().max()
    assert (made.double() - wanted).abs().max() < limit


@pytest.mark.parametrize("parts", [1, 16, 64])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 3e-7), (torch.bfloat16, 1e-5)])
def test_pooling_on_a_card_is_near(dtype: torch.dtype, limit: float, parts: int) -> None:
    """Half types are pooled in float32, channel after channel; float32 would lose 6e-6 of it."""
    torch.manual_seed(5)
    x = (3 + torch.randn(1, 64, 64, 16)).to(dtype)
    with as_on_a_card():
        stats = GroupStats(4, EPS)
        for rows in x.chunk(parts, 2):
            stats.add(rows)
        mean, spread = (vector.view(4, 16)[:, 0].double() for vector in stats.pooled())
    grouped = x.double().unflatten(1, (4, -1)).movedim(1, 0).flatten(1)
    deviation = grouped.var(1, correction=0).add(EPS).sqrt()
    assert ((mean - grouped.mean(1)) / deviation).abs().max() < limit
    assert (spread * deviation - 1).abs().max() < limit


def test_strips_that_are_cut_alike_share_their_weights() -> None:
    weights: Weights = {}
    with as_on_a_card():
        for rows in ([4, 9], [4, 9], [13]):
            stats = GroupStats(6, EPS, weights)
            for strip in _map(torch.bfloat16, torch.channels_last).split(rows, 2):
                stats.add(strip)
            stats.pooled()
    assert [counts.tolist() for counts in weights.values()] == [[4] * 4 + [9] * 4, [13] * 4]


def test_errors() -> None:
    with pytest.raises(ValueError, match="groups must be >= 1, got 0"):
        GroupStats(0, EPS)
    with pytest.raises(ValueError, match="no strip was added"):
        GroupStats(2, EPS).pooled()
