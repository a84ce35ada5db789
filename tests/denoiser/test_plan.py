"""The plan's choices."""

from __future__ import annotations

import pytest
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.peak import lean_peak_bytes
from pack.nodes.denoiser.plan import (
    CHUNK_TOKENS,
    LEAST_CHUNK_TOKENS,
    LEAST_SLACK,
    SLACK,
    denoiser_plan,
)
from pack.nodes.denoiser.sizes import Request


@pytest.mark.parametrize("groups", [1, 2, 5, 30])
@pytest.mark.parametrize("side", [256, 512, 1000, 1024, 2048, 4096])
@pytest.mark.parametrize("batch", [1, 4])
def test_automatic_chunk_is_the_largest_near_the_best(groups: int, side: int, batch: int) -> None:
    request = Request(side, side, batch)
    choices = CHUNK_TOKENS if groups < 30 else LEAST_CHUNK_TOKENS
    chosen = denoiser_plan(request, groups=groups)
    assert chosen.groups == groups and chosen.chunk_tokens in choices
    peaks = {c: lean_peak_bytes(request, DenoiserPlan(groups, c)) for c in choices}
    best = min(peaks.values())
    slack = SLACK if groups < 30 else LEAST_SLACK
    assert best <= peaks[chosen.chunk_tokens] <= slack * best
    larger = [peak for c, peak in peaks.items() if c > chosen.chunk_tokens]
    assert all(peak > slack * best for peak in larger)


def test_a_chunk_that_was_asked_for_is_taken() -> None:
    assert denoiser_plan(Request(1024, 1024), groups=3, chunk_tokens=77) == DenoiserPlan(3, 77)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups must be >= 1, got 0"),
        ({"groups": 1, "chunk_tokens": -1}, "chunk_tokens must be >= 0, got -1"),
    ],
)
def test_errors(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser_plan(Request(64, 64), **options)
