"""The plan's choices."""

from __future__ import annotations

from typing import Any

import pytest
from pack.nodes.denoiser.cost import attention_launches, feed_forward_launches
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.peak import block_elements, lean_peak_bytes, stock_peak_bytes
from pack.nodes.denoiser.plan import (
    CHUNK_MULTIPLE,
    FILL_TOKENS,
    LEAST_TOKENS,
    DenoiserChoice,
    denoiser_plan,
    fill_tokens,
)
from pack.nodes.denoiser.sizes import Request, TransformerSizes

SPEED, BALANCE, SMALLEST = map(DenoiserChoice, ("speed", "balance", "smallest"))
SIDES = [256, 512, 768, 1000, 1024, 1536, 2048, 4096]


def _launches(request: Request, plan: DenoiserPlan) -> int:
    halves = attention_launches, feed_forward_launches
    return sum(half(request.sizes, request.tokens, plan) for half in halves)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", [1, 4])
def test_each_preference_saves_more_memory_for_more_launches(side: int, batch: int) -> None:
    request = Request(side, side, batch)
    plans = [denoiser_plan(request, choice) for choice in (SPEED, BALANCE, SMALLEST)]
    peaks = [lean_peak_bytes(request, plan) for plan in plans]
    launches = [_launches(request, plan) for plan in plans]
    assert peaks == sorted(peaks, reverse=True) and launches == sorted(launches)
    assert peaks[0] <= 0.52 * stock_peak_bytes(request)


@pytest.mark.parametrize("side", SIDES)
def test_speed_takes_the_whole_length(side: int) -> None:
    request = Request(side, side)
    plan = denoiser_plan(request, SPEED)
    assert (plan.groups, plan.hidden_blocks, plan.holds_query) == (1, 1, True)
    assert min(plan.chunk_tokens, plan.feed_tokens) >= request.tokens


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("fill", [256, FILL_TOKENS, 1152])
def test_balance_takes_a_quarter_and_fills_the_card(side: int, fill: int) -> None:
    request = Request(side, side)
    plan = denoiser_plan(request, fill=fill)
    assert plan.groups == 1 and plan.holds_rope
    for chunk in (plan.chunk_tokens, plan.feed_tokens):
        assert chunk >= min(fill, request.tokens)
        assert chunk % CHUNK_MULTIPLE == 0 or chunk == request.tokens
    if request.tokens >= 3 * FILL_TOKENS:  # latent and text count little
        assert lean_peak_bytes(request, plan) <= 0.265 * stock_peak_bytes(request)


@pytest.mark.parametrize("side", SIDES)
def test_smallest_is_near_the_least_that_any_plan_holds(side: int) -> None:
    request = Request(side, side)

    def held(plan: DenoiserPlan) -> int:
        return request.tokens * 3840 + block_elements(request.sizes, request.tokens, plan)

    least = held(denoiser_plan(request, SMALLEST))
    chunks = {min(request.tokens, n) for n in (LEAST_TOKENS, 320, 384, 512, 1024)}
    for groups in (1, 2, 5, 10, 15, 30):
        for chunk in chunks:
            for holds_query in (True, False):
                plan = DenoiserPlan(groups, chunk, chunk, holds_query, 4, holds_rope=False)
                assert least <= 1.03 * held(plan), plan


def test_what_is_named_is_taken_and_the_rest_saves_memory() -> None:
    request = Request(1024, 1024)
    plan = denoiser_plan(request, DenoiserChoice(groups=3, chunk_tokens=77))
    assert (plan.groups, plan.chunk_tokens, plan.feed_tokens) == (3, 77, 77)
    peaks = [
        lean_peak_bytes(request, denoiser_plan(request, DenoiserChoice(groups=groups)))
        for groups in (0, 2, 3, 5, 30)
    ]
    assert peaks == sorted(peaks, reverse=True)
    # With chunks alone the heads are cut in two, as before there were preferences.
    assert denoiser_plan(request, DenoiserChoice(chunk_tokens=512)).groups == 2
    # Speed takes what is named, and the fewest launches with it.
    for groups in (3, 30):
        plan = denoiser_plan(request, DenoiserChoice("speed", groups))
        assert (plan.groups, plan.chunk_tokens, plan.feed_tokens) == (groups, 4352, 4352)
    # One head at a time is the smallest preference.
    assert denoiser_plan(request, DenoiserChoice(groups=30)) == denoiser_plan(request, SMALLEST)


@pytest.mark.parametrize("side", [1024, 2048, 4096, 8192])
def test_quantised_layers_are_not_cut_by_heads(side: int) -> None:
    """Names the bug: no plan had a quarter of the peak, so balance cut as far as it could."""
    request = Request(side, side, sizes=TransformerSizes(is_whole=True))
    plans = [denoiser_plan(request, choice) for choice in (SPEED, BALANCE, SMALLEST)]
    peaks = [lean_peak_bytes(request, plan) for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] <= 0.36 * stock_peak_bytes(request)
    assert _launches(request, plans[1]) <= 80


def test_one_head_of_keys_is_no_smallest_preference() -> None:
    request = Request(1024, 1024, sizes=TransformerSizes(kv_heads=1))
    assert denoiser_plan(request, DenoiserChoice(groups=1)).holds_rope


@pytest.mark.parametrize(
    ("multiprocessors", "rows"), [(24, 256), (30, 256), (58, 512), (128, 1152), (132, 1152)]
)
def test_rows_that_fill_a_card(multiprocessors: int, rows: int) -> None:
    """By hand: 3840 columns are 15 tiles of 256, rows come by 128."""
    assert fill_tokens(multiprocessors, 3840) == rows


def test_two_choices_together_save_what_each_does() -> None:
    mine = DenoiserChoice("balance", 0, 512)
    assert mine.and_also(DenoiserChoice("speed", 3)) == DenoiserChoice("balance", 3, 512)
    assert mine.and_also(DenoiserChoice("smallest", 0, 64)) == DenoiserChoice("smallest", 0, 64)
    assert mine.at_least(1) == mine and mine.at_least(3).groups == 3
    assert str(mine) == "balance, chunk_tokens 512" and str(SPEED) == "speed"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefer": "best"}, "prefer must be one of .*, got 'best'"),
        ({"groups": -1}, "groups must be >= 0, got -1"),
        ({"chunk_tokens": -1}, "chunk_tokens must be >= 0, got -1"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenoiserChoice(**options)
