"""Maps cut into strips in several ways, for the tests of stages."""

from __future__ import annotations

from itertools import accumulate, pairwise

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


def through(
    stage: Stage, x: torch.Tensor, runs: list[int], scale: float = 1, *, part: int = 3
) -> torch.Tensor:
    """What a stage makes of a map, strip by strip; `scale` rows of each row of the source.

    It is given the rows in parts of so many.
    """
    kept = 0

    def read(first: int, last: int, keep: int) -> list[torch.Tensor]:
        nonlocal kept
        assert 0 <= first < last <= x.shape[2]
        assert first >= kept, "these rows may be gone"
        kept = max(kept, keep)
        return list(x[:, :, first:last].split(part, 2))

    stops = sorted({0, *(int(scale * stop) for stop in accumulate(runs))})
    return torch.cat([stage.make(read, first, last, last) for first, last in pairwise(stops)], 2)


def assert_near(
    made: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype, roundings: int = 1
) -> None:
    assert made.dtype == dtype
    assert made.shape == wanted.shape
    limit = roundings * TOLERANCE[dtype] * wanted.abs().max()
    assert (made.double() - wanted).abs().max() < limit
