"""Up- and downsampling over strips, against the oracles of the whole map."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.vae import reference
from pack.nodes.vae.resample import DownConv, UpConv, upsampling_weight
from pack.testing.strip_runs import BOTH, C_IN, C_OUT, CUTS, WIDTH, assert_near, through, weights
from pack.testing.vae_models import Arithmetic


@BOTH
@CUTS
@pytest.mark.parametrize("is_fused", [True, False])
@torch.inference_mode()
def test_upsampling(dtype: torch.dtype, runs: list[int], is_fused: bool) -> None:
    torch.manual_seed(1)
    x = torch.randn(1, C_IN, 11, WIDTH).to(dtype)
    weight, bias = weights(C_OUT, C_IN, 3, 3, dtype=dtype)
    with Arithmetic() as work:
        made = through(UpConv(weight, bias, height=11, is_fused=is_fused), x, runs, 2)
    wanted = reference.upsampled_convolution(x, weight, bias)
    assert_near(made, wanted, dtype, 2 if is_fused else 1)
    # Beside the map's first and last row, an end of a strip makes one or two rows too many.
    row = 2 * WIDTH * C_IN * C_OUT * (4 if is_fused else 9)
    spare = 0 if len(runs) == 1 else 4 if is_fused else 2
    assert 22 * row <= work.total <= (22 + spare) * row


@BOTH
@CUTS
@pytest.mark.parametrize("width", [9, 10])
def test_downsampling(dtype: torch.dtype, runs: list[int], width: int) -> None:
    torch.manual_seed(2)
    weight, bias = weights(C_OUT, C_IN, 3, 3, dtype=dtype)
    for height, cuts in ((11, runs), (12, [*runs, 1])):
        x = torch.randn(1, C_IN, height, width).to(dtype)
        made = through(DownConv(weight, bias, height=height), x, cuts, 0.5)
        assert_near(made, reference.downsampled_convolution(x, weight, bias), dtype)


def test_the_fused_weight_is_the_sum_of_taps() -> None:
    weight = torch.arange(9.0).reshape(1, 1, 3, 3)
    fused = upsampling_weight(weight)[0, 0]
    assert fused.shape == (4, 4)
    assert fused.sum() == 4 * weight.sum()
    assert fused[0, 0] == weight[0, 0, 2, 2]
    assert fused[1, 2] == weight[0, 0, 1:3, 0:2].sum()
