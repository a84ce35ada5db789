"""The planner: budgets, and the plan of each sampling, each call of a VAE and each question."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from pack.nodes.denoiser.cost import RTX_3060, WAITING
from pack.nodes.denoiser.plan import DenoiserChoice
from pack.nodes.denoiser.sizes import Z_IMAGE, ControlSizes, Request
from pack.nodes.fit.answer import BUDGET_STEP_BYTES, answer
from pack.nodes.fit.planner import Planner, what_else
from pack.nodes.fit.stages import (
    FLUX_DECODER,
    FLUX_ENCODER,
    denoise_stages,
    published_models,
)
from pack.nodes.fit.what_fits import Run
from pack.nodes.prefer import PREFERENCES
from pack.nodes.units import GIB, MIB, PAGE_BYTES
from pack.nodes.vae.choice import VaeChoice
from pack.nodes.vae.plan import VaeCall

MODELS = published_models()
SMALLEST = DenoiserChoice("smallest")


@pytest.mark.parametrize(
    ("named", "room", "budget"),
    [(0, 10, 9), (4, 10, 4), (40, 10, 9), (0, None, None), (4, None, 4), (0, 1, 1)],
)
def test_budget_is_the_named_one_or_what_is_free_less_the_margin(named, room, budget):
    planner = Planner(MODELS, Request(1024, 1024), named, 1, "balance")
    assert planner.budget_bytes(room) == budget


def situation(side: int, *, room: float = 24, **changed: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {
        "latent_shape": (1, 16, side // 8, side // 8),
        "prompts": 1,
        "text_tokens": 30,
        "weight_bytes": MODELS.denoiser_weight_bytes,
        "other_bytes": 0,
        "controls": (),
        "room_bytes": int(room * GIB),
        "is_plain": True,
    }
    return {**usual, **changed}


def test_decides_each_sampling_by_what_is_there_then():
    planner = Planner(MODELS, Request(1024, 1024), 0, 0, "speed")
    whole = planner.decide(**situation(1024))
    assert whole.choice == DenoiserChoice("speed")
    assert (whole.limit_bytes, whole.budget_bytes) == (None, None)
    named = replace(planner, named_bytes=12 * GIB)
    assert named.decide(**situation(1024)).limit_bytes is None
    bounded = named.decide(**situation(1024, room=6))  # another process took the rest
    assert bounded.limit_bytes is not None
    assert bounded.limit_bytes + bounded.need_bytes < 6 * GIB == bounded.budget_bytes
    # With the buffers that the host streams through; weights take whole pages.
    assert 6 * GIB - PAGE_BYTES < bounded.peak_bytes <= 6 * GIB
    assert bounded.limit_bytes % PAGE_BYTES == 0
    by_estimate = replace(named, models=replace(MODELS, is_dynamic=False))
    assert by_estimate.decide(**situation(1024, room=6)).peak_bytes == 6 * GIB
    named = replace(named, models=replace(MODELS, has_prefetch=False))  # buffers of one size
    with_lora = named.decide(**situation(1024, weight_bytes=MODELS.denoiser_weight_bytes + GIB))
    assert with_lora.limit_bytes is not None
    tight = planner.decide(**situation(8192, room=5))
    assert tight.is_warning and tight.choice == SMALLEST and "what would fit" in tight.text
    assert planner.decide(**situation(1024, is_plain=False)).need_bytes > whole.need_bytes
    assert planner.decide(**situation(2048)).text.startswith("2048x2048, batch 1, 30 text tokens")


def test_a_controlnets_weights_share_the_limit_and_its_activations_count():
    """Bug: a ControlNet larger than the budget was refused, though its weights stream as well."""
    planner = Planner(MODELS, Request(1024, 1024), 4 * GIB, 0, "balance")
    net = ControlSizes()
    weights = 2 * net.parameters(Z_IMAGE)
    asked = situation(1024, other_bytes=weights, controls=(net,), has_patches=True)
    assert weights > planner.named_bytes
    alone, beside = planner.decide(**situation(1024)), planner.decide(**asked)
    assert beside.text.endswith("prefer balance; with a ControlNet")
    assert 4 * GIB - PAGE_BYTES < beside.peak_bytes <= beside.budget_bytes == 4 * GIB
    streams = 2 * 2 * 4096 * Z_IMAGE.dim
    more = beside.live_bytes[0] - alone.live_bytes[0]
    assert streams < more < 2 * streams
    two = planner.decide(**{**asked, "controls": (net, net)})
    assert two.text.endswith("; with 2 ControlNets")
    assert two.live_bytes[0] == pytest.approx(beside.live_bytes[0] + streams, rel=0.02)


def test_what_would_fit_is_told_for_the_sampling_as_it_is():
    """With all prompts in one call, the host's own forward and a LoRA."""
    planner = Planner(MODELS, Request(2048, 2048), int(1.9 * GIB), 0, "balance")
    asked = situation(
        2048, latent_shape=(2, 16, 256, 256), prompts=2, is_plain=False,
        weight_bytes=MODELS.denoiser_weight_bytes + 2**28,
    )  # fmt: skip
    text = planner.decide(**asked).text
    told = re.search(r"what would fit: a batch of 1, or (\d+)x(\d+)|what would fit: (\d+)x", text)
    assert told, text
    side = int(told[1] or told[3])
    for pixels, is_warning in ((side, False), (side + 64, True)):
        smaller = replace(planner, prefer="smallest").decide(
            **{**asked, "latent_shape": (2, 16, pixels // 8, pixels // 8)}
        )
        assert smaller.is_warning == is_warning, (pixels, smaller.text)


@pytest.mark.parametrize("has_clip", [False, True])
def test_a_text_encoder_that_is_too_large_asks_for_clip(has_clip):
    """ComfyUI's own needs its embedding on the card; with clip connected that stays in RAM."""
    budget = int(0.8 * GIB)
    request = Request(512, 512)
    planner = Planner(MODELS, request, budget, 0, "balance", run=Run(has_clip=has_clip))
    plan = planner.plan(request, budget)
    if has_clip:
        assert plan.verdict != "too large" and isinstance(what_else(plan), list)
    else:
        with pytest.raises(ValueError, match=r"text encode.*or connect clip, so that"):
            what_else(plan)


def test_prompts_that_do_not_fit_together_are_not_refused():
    """The host takes them one by one then."""
    planner = Planner(MODELS, Request(1024, 1024), 0, 0, "smallest")
    room = denoise_stages(MODELS, Request(1024, 1024, text_tokens=30))[SMALLEST].least_bytes / GIB
    alone = planner.decide(**situation(1024, room=room))
    together = planner.decide(**situation(1024, room=room, prompts=40))
    assert not alone.is_warning and alone.text == together.text
    both = planner.decide(**situation(1024, prompts=2))
    assert "batch 1, 2 prompts at a time" in both.text
    assert both.live_bytes[0] < both.live_bytes[1]


def test_weights_of_a_block_count_where_they_are_streamed_or_cast():
    """The host's allocator holds copies beside the activations, up to a feed-forward's 225 MiB."""
    planner = Planner(MODELS, Request(1024, 1024), 0, 0, "speed")
    prefetched = planner.decide(**situation(1024, room=6))
    assert prefetched.prefetches and len(set(prefetched.live_bytes)) == 1
    planner = replace(planner, models=replace(MODELS, has_prefetch=False))
    assert len(set(planner.decide(**situation(1024)).live_bytes)) == 1
    streamed = planner.decide(**situation(1024, room=6)).live_bytes
    # Not the 112.5 MiB of the attention alone; not the whole 225, as the peaks differ in place.
    assert 112.5 * MIB < streamed[1] - streamed[0] < 225 * MIB
    in_fp8 = planner.decide(**situation(1024, weight_bytes=MODELS.denoiser_weight_bytes // 2))
    assert in_fp8.live_bytes == (streamed[1], streamed[1])


def test_a_host_that_loads_by_estimate_keeps_more_free_on_a_small_card():
    planner = Planner(MODELS, Request(1024, 1024), 0, 0, "speed")
    request, room = Request(1024, 1024), 8 * GIB
    usual, floored = (
        replace(planner, floor_bytes=floor).plan(request, room).stage("denoise")
        for floor in (0, GIB)
    )
    assert usual.need_bytes < GIB == floored.need_bytes
    # A budget far below the room leaves as much free already.
    named = replace(planner, floor_bytes=GIB, named_bytes=6 * GIB).plan(request, room)
    assert named.stage("denoise").need_bytes == usual.need_bytes


def test_each_call_of_a_vae_is_chosen_by_its_own_need():
    for sizes in (FLUX_ENCODER, FLUX_DECODER):
        call = VaeCall(sizes, 4096, 4096, 2, has_ram=True)
        needs = [VaeChoice(prefer, 0).need(call) for prefer in PREFERENCES]
        assert needs == sorted(needs, reverse=True)
        for place, need in enumerate(needs):
            planner = Planner(MODELS, Request(64, 64), 0, 0, "speed")
            room = need + 5 * PAGE_BYTES  # its weights, 159.9 MiB in whole pages
            assert planner.vae_choice(call, room).prefer == PREFERENCES[place]
            smaller = PREFERENCES[min(place + 1, len(PREFERENCES) - 1)]
            assert planner.vae_choice(call, room - 1).prefer == smaller


def test_what_the_host_decodes_is_shown_and_not_judged():
    run = Run(has_lean_vae=False)
    planner = Planner(MODELS, Request(4096, 4096), 4 * GIB, 0, "balance", run=run)
    made = planner.plan(planner.request, None)
    assert made.stages[-1].setting == "ComfyUI's own" and made.verdict == "fits"
    assert made.stages[-1].activation_bytes > 20 * GIB
    # Convolutions without a library for them copy their 256 channels nine times, in bfloat16.
    unrolled = replace(planner, models=replace(MODELS, is_unrolled=True))
    copied = unrolled.plan(planner.request, None).stages[-1].activation_bytes
    assert copied - made.stages[-1].activation_bytes == 9 * 256 * 4096**2 * 2
    done = planner.plan(planner.request, None, run=replace(run, has_text=False))
    assert [stage.name for stage in done.stages] == ["denoise", "VAE decode"]


def test_decides_against_what_cannot_run():
    planner = Planner(MODELS, Request(1024, 1024), GIB // 4, 0, "balance")
    with pytest.raises(ValueError, match=r"budget 256.0 MiB: does not fit: .* short"):
        planner.decide(**situation(1024))


def test_answers_the_page():
    asked = {
        "width": 2048, "height": 1024, "batch_size": 2, "budget_gib": 8, "prefer": "speed",
        "has_vae": True,
    }  # fmt: skip
    seen = answer(asked, None, 0, models=MODELS)
    assert seen["headline"].startswith("2048x1024, batch 2") and seen["verdict"] == "fits"
    assert answer({**asked, "budget_gib": 0.25}, None, 0, models=MODELS)["others"] == []
    assert seen["stages"][-1]["setting"] == "Lean VAE speed"
    without = answer({**asked, "has_vae": False}, None, 0, models=MODELS)["stages"][-1]
    assert without["setting"] == "ComfyUI's own" and without["peak"] > seen["stages"][-1]["peak"]
    auto = answer({**asked, "budget_gib": 0}, 6 * GIB, GIB, models=MODELS)
    assert (auto["budget_bytes"], auto["named_bytes"]) == (5 * GIB, 0)
    for bad in ({"width": 4}, {"prefer": "most"}, {"batch_size": None}, {"budget_gib": "x"}):
        with pytest.raises((ValueError, TypeError)):
            answer({**asked, **bad}, None, 0, models=MODELS)


@pytest.mark.parametrize(("side", "gib"), [(1024, 0.25), (8192, 2), (4096, 1.75)])
def test_offers_the_page_the_smallest_budget_that_fits(side: int, gib: float):
    asked = {
        "width": side, "height": side, "batch_size": 1, "budget_gib": gib, "prefer": "balance",
        "has_vae": True, "has_clip": True,
    }  # fmt: skip
    seen = answer(asked, None, 0, models=MODELS)
    larger = seen["larger_bytes"]
    assert seen["verdict"] != "fits" and larger % BUDGET_STEP_BYTES == 0

    def verdict(named: int) -> str:
        return answer({**asked, "budget_gib": named / GIB}, None, 0, models=MODELS)["verdict"]

    assert verdict(larger) == "fits" != verdict(larger - BUDGET_STEP_BYTES)
    # A card that has not that much free: no budget would help.
    assert answer(asked, larger - BUDGET_STEP_BYTES, 0, models=MODELS)["larger_bytes"] is None
    assert answer({**asked, "budget_gib": 64}, None, 0, models=MODELS)["larger_bytes"] is None


def test_tells_the_page_how_long_a_step_copies_and_waits():
    asked = {
        "width": 2048, "height": 2048, "batch_size": 1, "budget_gib": 8, "prefer": "balance",
        "has_vae": True, "has_clip": True,
    }  # fmt: skip
    fetched = answer(asked, None, 0, models=replace(MODELS, has_prefetch=True))
    (streamed,) = [one["streamed"] for one in fetched["stages"] if one["name"] == "denoise"]
    assert fetched["copy_seconds"] == streamed / RTX_3060.copy_bytes_per_s > 0
    assert fetched["wait_seconds"] == 0 and not fetched["is_copy_measured"]
    alone = answer(asked, None, 0, models=replace(MODELS, has_prefetch=False))
    assert alone["wait_seconds"] == WAITING * alone["copy_seconds"] > 0
    assert answer({**asked, "budget_gib": 64}, None, 0, models=MODELS)["copy_seconds"] == 0
