"""How blocks with a parallel feed-forward are cut, by hand at the sizes of FLUX."""

from __future__ import annotations

import dataclasses

import pytest
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.parallel_plan import (
    BALANCE_ROOM,
    parallel_elements,
    parallel_launches,
    stock_parallel_elements,
)
from pack.nodes.denoiser.plan import SLACK, DenoiserChoice, plan_for
from pack.nodes.denoiser.sizes import TransformerSizes

FLUX_2 = TransformerSizes(
    dim=6144,
    heads=48,
    kv_heads=48,
    ffn_dim=18432,
    is_parallel=True,
    stock_elements=17 * 6144,
)
FLUX_1 = TransformerSizes(
    dim=3072,
    heads=24,
    kv_heads=24,
    ffn_dim=12288,
    is_gated=False,
    is_parallel=True,
    stock_elements=14 * 3072,
)
BOTH = {"FLUX.2": FLUX_2, "FLUX.1": FLUX_1}
SIZES = pytest.mark.parametrize("sizes", BOTH.values(), ids=BOTH)


def chosen(sizes: TransformerSizes, tokens: int, choice: DenoiserChoice) -> DenoiserPlan:
    plan = plan_for(sizes, 1, (tokens,), choice).parallel
    assert plan is not None
    return plan


@pytest.mark.parametrize(
    ("sizes", "chunk", "blocks", "streams"),
    [
        # q, k, v and a chunk; what was attended to, rows, both joined, hidden factor.
        (FLUX_1, 4608, 1, max(3 + 1, 1 + 1 + 4)),
        (FLUX_1, 2304, 1, max(3 + 0.5, 1 + 2.5)),
        (FLUX_2, 4608, 1, 1 + 1 + 3 + 3),
        (FLUX_2, 2304, 2, 1 + 2 + 0.75),
        (FLUX_2, 1152, 4, 3 + 0.25),
    ],
)
def test_elements_by_hand(sizes: TransformerSizes, chunk: int, blocks: int, streams: float) -> None:
    plan = DenoiserPlan(1, chunk, chunk, hidden_blocks=blocks)
    assert parallel_elements(sizes, 4608, plan) == streams * 4608 * sizes.dim


@SIZES
@pytest.mark.parametrize("side", [1024, 2048])
def test_each_preference_saves_more_memory_for_more_launches(
    sizes: TransformerSizes, side: int
) -> None:
    tokens = (side // 16) ** 2 + 512
    plans = [
        chosen(sizes, tokens, DenoiserChoice(prefer)) for prefer in ("speed", "balance", "smallest")
    ]
    held = [parallel_elements(sizes, tokens, plan) / tokens / sizes.dim for plan in plans]
    launches = [parallel_launches(sizes, tokens, plan) for plan in plans]
    assert held == sorted(held, reverse=True) and launches == sorted(launches)
    assert plans[0].chunk_tokens == tokens
    assert held[1] <= 3 + BALANCE_ROOM and held[2] < 1.8


@SIZES
def test_what_is_named_is_taken_and_the_rest_saves_memory(sizes: TransformerSizes) -> None:
    plan = chosen(sizes, 4608, DenoiserChoice("balance", 3, 640))
    assert (plan.groups, plan.chunk_tokens) == (3, 640)
    least = min(
        parallel_elements(sizes, 4608, DenoiserPlan(3, 640, 640, hidden_blocks=blocks))
        for blocks in (1, 2, 4)
    )
    assert parallel_elements(sizes, 4608, plan) <= SLACK * (least + 4608 * sizes.dim)


@SIZES
@pytest.mark.parametrize("is_copied", [False, True])
@pytest.mark.parametrize("tokens", [700, 1536, 4608, 16896])
def test_a_projection_that_comes_whole_is_called_once_below_the_hosts_peak(
    sizes: TransformerSizes, tokens: int, is_copied: bool
) -> None:
    """Names the bug: it was called twice, and "speed" held more than ComfyUI."""
    whole = dataclasses.replace(sizes, is_whole=True, is_copied=is_copied)
    of_host = max(
        sizes.stock_elements * tokens, stock_parallel_elements(whole, tokens)
    )  # as families.family_stock_bytes has it
    held = []
    for prefer in ("speed", "balance", "smallest"):
        plan = chosen(whole, tokens, DenoiserChoice(prefer))
        held.append(tokens * sizes.dim + parallel_elements(whole, tokens, plan))
        if tokens > 4000:  # of few tokens a copy of the weight is most of what the host holds
            assert plan.holds_hidden == (prefer != "smallest")
        assert held[-1] < of_host
    assert held == sorted(held, reverse=True)
