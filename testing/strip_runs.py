"""Maps cut into strips in several ways, for the tests of stages."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.vae.strips import Stage

RUNS = {"one": [11], "rows": [1] * 11, "rest": [4, 4, 3], "uneven": [1, 7, 2, 1]}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
C_IN, C_OUT, WIDTH = 8, 12, 9
BOTH = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
CUTS = pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)


def weights(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.tensor(shape[1:]).prod() ** -0.5
    return (torch.randn(shape) * scale).to(dtype), torch.randn(shape[0]).to(dtype)


def through(stage: Stage, x: torch.Tensor, runs: list[int]) -> torch.Tensor:
    strips = [stage.push(rows) for rows in x.split(runs, 2)]
    return torch.cat([strip for strip in strips if strip is not None], 2)


def assert_near(
    made: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1
) -> None:
    assert made.dtype == dtype
    assert made.shape == wanted.shape
    limit = roundings * TOLERANCE[dtype] * wanted.abs().max()
    assert (made.double() - wanted).abs().max() < limit
