"""Modelled seconds, by hand and against figures that were found otherwise."""

from __future__ import annotations

import pytest
from pack.nodes.denoiser.cost import (
    CARDS,
    H100,
    LAUNCH_S,
    REACHED,
    RTX_4060,
    WAITING,
    Card,
    Work,
    block_work,
    seconds,
    step_work,
)
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
from pack.nodes.denoiser.sizes import Z_IMAGE, Request

SPEED, BALANCE, SMALLEST = map(DenoiserChoice, ("speed", "balance", "smallest"))
# 1000 operations and 100 bytes a second, of which 0.7 are reached; 10 bytes; a launch in 0.01 s.
SLOW = Card("slow", 1000, 100, 10, 0.01)


@pytest.mark.parametrize(
    ("work", "streamed", "wanted"),
    [
        (Work(launches=500, flops=700, row_bytes=70), 10, 5),
        (Work(launches=100, flops=700, moved_bytes=10**9, row_bytes=140), 10, 3),
        (Work(launches=100, flops=700, row_bytes=70), 40, 4),
        (Work(launches=100), 0, 1),
    ],
)
def test_the_longest_of_issuing_computing_and_copying_counts(work, streamed, wanted):
    taken = seconds(work, SLOW, streamed_bytes=streamed, prefetches=True)
    assert taken == pytest.approx(wanted)


def test_without_prefetch_the_card_waits_for_a_part_of_what_is_streamed():
    """By hand: 2 s of arithmetic and traffic; 1 s of copies, of which 0.68 hide behind nothing."""
    work = Work(launches=100, flops=700, row_bytes=70)
    taken = [seconds(work, SLOW, streamed_bytes=10, prefetches=p) for p in (True, False)]
    assert taken == pytest.approx([2, 2.68])


def test_what_waits_is_qkv_w2_and_w3():
    sizes = Z_IMAGE
    waits = sizes.dim * (sizes.qkv_dim + 2 * sizes.ffn_dim)
    block = sizes.block_parameters + sizes.modulation_parameters
    assert waits / block == pytest.approx(WAITING, abs=5e-3)


def test_the_model_says_what_the_former_default_cost():
    """Of two groups and 512 tokens, 554 launches: 1.6 to 1.85 times the host's block on an H100
    and up to 1.2 times on an RTX 4060. An H100 takes about 3 ms for the host's.
    """
    request = Request(1024, 1024)
    host = block_work(request, None)
    former = block_work(request, DenoiserPlan(2, 512, 512, hidden_blocks=4))
    former = Work(554, former.flops, former.moved_bytes, former.row_bytes)
    assert seconds(host, H100) == pytest.approx(3e-3, rel=0.2)
    assert 1.6 < seconds(former, H100) / seconds(host, H100) < 1.85
    assert 1.1 < seconds(former, RTX_4060) / seconds(host, RTX_4060) < 1.25
    # One thread issues them.
    assert seconds(former, H100) == 554 * LAUNCH_S == pytest.approx(5.8e-3, rel=0.05)


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("batch", [1, 4])
def test_more_memory_takes_less_time(card, batch):
    for side in (512, 1024, 2048, 4096):
        request = Request(side, side, batch)
        taken = [
            seconds(step_work(request, denoiser_plan(request, choice)), card)
            for choice in (SPEED, BALANCE, SMALLEST)
        ]
        assert taken == sorted(taken)
        # Samples one by one read the weights of each product again.
        most = 1 if batch == 1 else 1.15
        assert taken[0] <= most * seconds(step_work(request, None), card)


@pytest.mark.parametrize("plan", [None, DenoiserPlan(3, 1024, 1024), DenoiserPlan(1, 512, 2048)])
def test_more_pixels_text_and_pictures_are_more_work(plan):
    least = step_work(Request(512, 512, 1, 32), plan)
    for more in ((512, 1024, 1, 32), (512, 512, 2, 32), (512, 512, 1, 400)):
        work = step_work(Request(*more), plan)
        assert work.flops > least.flops and work.moved_bytes > work.row_bytes > least.row_bytes
        assert seconds(work, H100) >= seconds(least, H100)


def test_a_step_is_its_blocks_and_refiners():
    """By hand: 30 main blocks of 4352 tokens; refiners of 4096 and of 256 tokens, two of each."""
    request, plan = Request(1024, 1024), DenoiserPlan(1, 1088, 1088)
    refined = Request(1024, 1024, text_tokens=256)
    work = step_work(request, plan)
    parts = [block_work(refined, plan, tokens=count).flops for count in (4352, 4096, 256)]
    assert work.flops == 30 * parts[0] + 2 * parts[1] + 2 * parts[2]
    weights = (3 * 10240 + 4 * 3840) * 3840
    attention = 4 * 4352**2 * 3840
    assert parts[0] == 2 * 4352 * weights + attention + 2 * 256 * 4 * 3840


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_cards_figures_are_of_one_order(card):
    """A slip of a thousand in a constant."""
    assert 10e12 < card.flops_per_s < 2e15 and 0.1e12 < card.bytes_per_s < 10e12
    assert 10e9 < card.copy_bytes_per_s < 100e9 and 0 < REACHED < 1
