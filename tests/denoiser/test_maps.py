"""Convolutions by strips equal those of the whole map, and hold what their docstrings say."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from pack.nodes.denoiser.maps import convolve_strips, write_normed, write_upsampled
from pack.nodes.denoiser.unet_cuts import LEAST_PIXELS, strip_rows
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16]


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strips", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("sides", [(48, 40), (37, 64), (8, 16)])
def test_normed_strips_have_the_bits_of_the_whole_map(
    dtype: torch.dtype, strips: int, sides: tuple[int, int]
) -> None:
    source = drawn(96, *sides, dtype=dtype, seed=0)
    weight, bias = (drawn(96, dtype=dtype, seed=seed) for seed in (1, 2))
    kernel, shift = drawn(64, 96, 3, 3, dtype=dtype, seed=3) / 30, drawn(64, dtype=dtype, seed=4)
    into = torch.full((64, *sides), torch.nan, dtype=dtype)
    convolve_strips(
        functools.partial(write_normed, source, 32, weight, bias, 1e-5),
        96,
        into,
        lambda strip: functional.conv2d(strip, kernel, shift, padding=(0, 1)),
        strips=strips,
    )
    normed = functional.silu(functional.group_norm(source[None], 32, weight, bias, 1e-5))
    wanted = functional.conv2d(normed, kernel, shift, padding=1)[0]
    if sides[0] * sides[1] < LEAST_PIXELS:  # the CPU has another kernel for so few
        assert torch.allclose(into, wanted, rtol=1e-2, atol=1e-2)
    else:
        assert torch.equal(into, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strips", [1, 3, 8])
def test_upsampled_strips_have_the_bits_of_the_whole_map(dtype: torch.dtype, strips: int) -> None:
    source = drawn(64, 24, 20, dtype=dtype, seed=0)
    kernel, shift = drawn(32, 64, 3, 3, dtype=dtype, seed=3) / 24, drawn(32, dtype=dtype, seed=4)
    into = torch.full((32, 48, 40), torch.nan, dtype=dtype)
    convolve_strips(
        functools.partial(write_upsampled, source),
        64,
        into,
        lambda strip: functional.conv2d(strip, kernel, shift, padding=(0, 1)),
        strips=strips,
    )
    whole = functional.interpolate(source[None], scale_factor=2, mode="nearest")
    assert torch.equal(into, functional.conv2d(whole, kernel, shift, padding=1)[0])


@pytest.mark.parametrize("sides", [(8, 10), (7, 10), (8, 9), (7, 9)])
@pytest.mark.parametrize("rows", [(0, 1), (0, 7), (1, 2), (1, 7), (2, 7), (3, 8), (7, 8)])
def test_upsampled_rows_are_those_of_the_doubled_map(
    rows: tuple[int, int], sides: tuple[int, int]
) -> None:
    rows = min(rows[0], sides[0] - 1), min(rows[1], sides[0])
    source = drawn(3, 4, 5, dtype=torch.float32, seed=0)
    into = torch.full((3, rows[1] - rows[0], sides[1]), torch.nan)
    write_upsampled(source, *rows, into)
    whole = functional.interpolate(source[None], size=sides, mode="nearest")[0]
    assert torch.equal(into, whole[:, slice(*rows)])


@pytest.mark.parametrize("has_factors", [False, True])
def test_a_norm_without_weights(has_factors: bool) -> None:
    source = drawn(64, 16, 32, dtype=torch.float32, seed=0)
    factors = [drawn(64, dtype=torch.float32, seed=i) if has_factors else None for i in (1, 2)]
    into = torch.empty(64, 5, 32)
    write_normed(source, 32, *factors, 1e-6, 3, 8, into)
    wanted = functional.silu(functional.group_norm(source[None], 32, *factors, 1e-6))
    assert torch.equal(into, wanted[0, :, 3:8])


def test_the_peak_at_the_sizes_of_sdxl() -> None:
    """960 channels of 256 x 256 in four strips: a strip, then an eighth of the map beside it."""
    bytes_each, strips = 2, 4
    with FakeTensorMode():
        source = torch.empty(960, 256, 256, dtype=torch.bfloat16)
        weight, bias = (torch.empty(960, dtype=torch.bfloat16) for _ in range(2))
        kernel = torch.empty(320, 960, 3, 3, dtype=torch.bfloat16)
        into = torch.empty(320, 256, 256, dtype=torch.bfloat16)
        with Tracker() as tracker:
            convolve_strips(
                functools.partial(write_normed, source, 32, weight, bias, 1e-5),
                960,
                into,
                lambda strip: functional.conv2d(strip, kernel, None, padding=(0, 1)),
                strips=strips,
            )
    strip = 960 * (256 // strips + 2) * 256 * bytes_each
    assert tracker.peak_bytes <= strip + 1.02 * max(
        source.numel() // 8 * bytes_each, into.numel() // strips * bytes_each
    )
    assert tracker.current_bytes == 0


@pytest.mark.parametrize("sides", [(1, 1), (48, 40), (37, 64), (256, 256), (17, 2000)])
@pytest.mark.parametrize("strips", [1, 2, 3, 8])
def test_strips_are_all_rows_and_none_is_too_short(sides: tuple[int, int], strips: int) -> None:
    height, width = sides
    runs = strip_rows(height, width, strips)
    assert runs[0][0] == 0 and runs[-1][1] == height
    assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))
    assert len(runs) <= strips
    assert len(runs) == 1 or min(b - a for a, b in runs) * width >= LEAST_PIXELS


def test_errors() -> None:
    with pytest.raises(ValueError, match="strips must be >= 1, got 0"):
        strip_rows(8, 8, 0)
