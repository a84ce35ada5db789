"""The largest picture and batch that the table names."""

from __future__ import annotations

from pack.benchmarks.fit_table import largest_batch, largest_square
from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.stages import published_models
from pack.nodes.fit.what_fits import fit
from pack.nodes.units import GIB

MODELS = published_models()


def verdict(side: int) -> str:
    return fit(MODELS, Request(side, side), 2 * GIB, prefer="smallest").verdict


def test_largest_square_and_batch_grow_with_the_budget():
    squares = [largest_square(MODELS, gib * GIB) for gib in (1, 2, 3, 4)]
    batches = [largest_batch(MODELS, Request(1024, 1024), gib * GIB) for gib in (1, 2, 3, 4)]
    assert squares == sorted(set(squares)) and batches == sorted(set(batches))
    side = squares[1]
    assert verdict(side) == "fits"
    assert verdict(side + 16) != "fits"
    assert largest_square(MODELS, GIB // 8) == 0
