"""What the lean block's operations on rows do: chunks, a projection's columns, modulation."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.denoiser.cuts import chunks
from pack.nodes.denoiser.rows import Modulation, Projection, clamp_fp16_, columns_of
from pack.nodes.probe.tracker import PeakTracker
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16]


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _projection(*, has_bias: bool, has_weight: bool, dtype: torch.dtype) -> Projection:
    weight = _draw(35, 24, seed=1, dtype=dtype)
    bias = _draw(35, seed=2, dtype=dtype) if has_bias else None
    if has_weight:
        return Projection(lambda: columns_of(weight, bias))
    return Projection(
        lambda: lambda rows, first, last, _: functional.linear(rows, weight, bias)[:, first:last],
        is_whole=True,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("span", [(0, None), (0, 35), (5, 17), (34, None), (30, 40)])
def test_projection_gives_the_columns_asked_for(
    dtype: torch.dtype, has_bias: bool, has_weight: bool, span: tuple[int, int | None]
) -> None:
    rows = _draw(13, 24, dtype=dtype)
    whole = _projection(has_bias=has_bias, has_weight=has_weight, dtype=dtype)
    wanted = rows.double() @ _draw(35, 24, seed=1, dtype=dtype).double().T
    if has_bias:
        wanted = wanted + _draw(35, seed=2, dtype=dtype).double()
    got = whole(rows, *span)
    wanted = wanted[:, slice(*span)]
    assert got.dtype == dtype and got.shape == wanted.shape
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]


def test_projection_allocates_the_columns_only() -> None:
    rows = _draw(13, 24)
    projection = _projection(has_bias=True, has_weight=True, dtype=torch.float32)
    with PeakTracker() as tracker:
        kept = projection(rows, 5, 17)
    assert tracker.peak_bytes == kept.nbytes == 13 * 12 * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
def test_projection_writes_columns_side_by_side(
    dtype: torch.dtype, has_bias: bool, has_weight: bool
) -> None:
    """Into rows of a wider tensor, with the bits of a product of its own."""
    rows, spans = _draw(13, 24, dtype=dtype), [(30, 35), (5, 17)]
    projection = _projection(has_bias=has_bias, has_weight=has_weight, dtype=dtype)
    wide = torch.full((13, 20), torch.nan, dtype=dtype)
    with PeakTracker() as tracker:
        projection.write(rows, spans, wide[:, 2:19])
    whole = 0 if has_weight else 13 * 35 * dtype.itemsize
    assert tracker.peak_bytes <= whole and tracker.current_bytes == 0
    assert torch.equal(wide[:, 2:19], torch.cat([projection(rows, *s) for s in spans], dim=1))
    assert wide[:, :2].isnan().all() and wide[:, 19:].isnan().all()


SEGMENTS = {
    "one": [(0, 40)],
    "two": [(0, 7), (7, 40)],
    "four": [(0, 1), (1, 16), (16, 17), (17, 40)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("chunk", [1, 6, 7, 16, 40])
def test_modulation_of_a_chunk(
    dtype: torch.dtype, spans: list[tuple[int, int]], chunk: int
) -> None:
    rows = _draw(40, 24, dtype=dtype)
    factors = [_draw(24, seed=3 + i, dtype=dtype) for i in range(len(spans))]
    of_tokens = torch.cat([f.expand(b - a, 24) for (a, b), f in zip(spans, factors, strict=True)])
    modulation = Modulation([(*span, f) for span, f in zip(spans, factors, strict=True)])
    got = rows.clone()
    for start, stop in chunks(40, chunk):
        part = got[start:stop]
        with PeakTracker() as tracker:
            assert modulation.multiply_(part, start) is part
        assert tracker.peak_bytes == 0
    assert torch.equal(got, rows * of_tokens)


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES])
def test_clamp_makes_half_precision_finite_and_nothing_else(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1.5, torch.nan, torch.inf, -torch.inf]], dtype=dtype)
    before = rows.clone()
    with PeakTracker() as tracker:
        assert clamp_fp16_(rows) is rows
    assert tracker.peak_bytes == 0
    wanted = before
    if dtype == torch.float16:
        wanted = torch.tensor([[1.5, 0.0, 65504.0, -65504.0]], dtype=dtype)
    assert torch.equal(rows.nan_to_num(nan=7.0), wanted.nan_to_num(nan=7.0))
