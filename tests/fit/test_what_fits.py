"""What a plan chooses, what it says of what does not fit, and that it is quick."""

from __future__ import annotations

import itertools
import random
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from pack.nodes.denoiser.need import denoiser_live_bytes
from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
from pack.nodes.denoiser.sizes import ControlSizes, Request, TransformerSizes
from pack.nodes.fit import report
from pack.nodes.fit.stage import ASSUMED_CARD, Stage
from pack.nodes.fit.stages import (
    DENOISER_CHOICES,
    Models,
    denoise_stages,
    published_models,
    text_stage,
    vae_stage,
    vae_stages,
)
from pack.nodes.fit.text_encoder import FUSED_SCORE, text_encoder_peak_bytes
from pack.nodes.fit.what_fits import (
    WHOLE_RUN,
    Alternative,
    Fit,
    Run,
    alternatives,
    fit,
)
from pack.nodes.prefer import PREFERENCES, Prefer

GIB, MIB = 2**30, 2**20
MODELS = published_models()
SPEED, BALANCE, SMALLEST = map(DenoiserChoice, ("speed", "balance", "smallest"))


def plan(
    width: int,
    height: int,
    batch: int = 1,
    gib: float | None = 8,
    *,
    prefer: Prefer = "balance",
    models: Models = MODELS,
    run: Run = WHOLE_RUN,
) -> Fit:
    budget = None if gib is None else int(gib * GIB)
    return fit(models, Request(width, height, batch), budget, prefer=prefer, run=run)


def settings(made: Fit) -> list[str]:
    return [stage.setting for stage in made.stages[1:]]


def test_the_published_models_weigh_what_they_weigh():
    sizes = (MODELS.denoiser_weight_bytes, MODELS.text_weight_bytes, MODELS.vae_weight_bytes)
    assert [round(size / GIB, 2) for size in sizes] == [11.46, 7.49, 0.16]
    assert published_models(weight_bits=4.5).denoiser_weight_bytes == sizes[0] * 9 // 32


@pytest.mark.parametrize(
    ("prefer", "chosen"),
    [
        ("speed", ["Apply Gradient Checkpoint: prefer speed", "Lean VAE speed"]),
        ("balance", ["Apply Gradient Checkpoint: prefer balance", "Lean VAE balance"]),
        ("smallest", ["Apply Gradient Checkpoint: prefer smallest", "Lean VAE smallest"]),
    ],
)
def test_a_preference_begins_at_its_setting(prefer, chosen):
    assert settings(plan(1024, 1024, prefer=prefer)) == chosen
    assert settings(plan(1024, 1024, gib=None, prefer=prefer)) == chosen


def test_a_preference_allows_its_own_choices_and_those_that_save_more():
    allowed = [list(denoise_stages(MODELS, Request(64, 64), prefer=p)) for p in PREFERENCES]
    assert allowed == [list(DENOISER_CHOICES), list(DENOISER_CHOICES[1:]), [SMALLEST]]


def test_a_choice_can_be_pinned_on_apply_gradient_checkpoint():
    """The setting names the inputs, and their plan is the one that was judged."""
    request = Request(2048, 2048)
    for choice, stage in denoise_stages(MODELS, request).items():
        found = re.fullmatch(
            r"Apply Gradient Checkpoint: prefer (\w+)(?:, head_groups (\d+))?", stage.setting
        )
        assert found, stage.setting
        pinned = DenoiserChoice(found[1], int(found[2] or 0))  # pyright: ignore[reportArgumentType]
        live = denoiser_live_bytes(request, denoiser_plan(request, pinned), is_plain=True)
        assert (pinned, live.plain) == (choice, stage.activation_bytes)


def test_of_two_that_fit_the_cheaper_is_taken():
    """At 256x256, where all fit. By hand: copies of 25 GB/s; smallest leaves a page of 32 MiB more
    for weights than the others, and its steps take 0.454 s of arithmetic and traffic.

    In 24 GiB nothing is streamed, and speed has the least work. In 2 GiB 10.21 GiB come from RAM in
    0.439 s: in that all but smallest hide, and the smaller peak is taken. In 1.25 GiB it is 10.96
    GiB in 0.471 s, and a page less is 1.3 ms less.
    """

    def ways(budget: int | None) -> dict[DenoiserChoice, Stage]:
        stages = denoise_stages(MODELS, Request(256, 256))
        return {choice: stage.within(budget) for choice, stage in stages.items()}

    assert ASSUMED_CARD.copy_bytes_per_s == 25e9
    assert ways(None)[SMALLEST].step_seconds(None) == pytest.approx(0.454, abs=1e-3)
    for gib, streamed, chosen in ((24, 0, SPEED), (2, 10.214, BALANCE), (1.25, 10.964, SMALLEST)):
        budget = int(gib * GIB)
        assert all(stage.least_bytes <= budget for stage in ways(budget).values())
        for choice in (SPEED, BALANCE):
            found = ways(budget)[choice].streamed_bytes(budget)
            assert found == pytest.approx(streamed * GIB, rel=1e-3)
        assert plan(256, 256, gib=gib, prefer="speed").choice == chosen
    speed, balance = (ways(2 * GIB)[choice] for choice in (SPEED, BALANCE))
    tied = speed.step_seconds(2 * GIB), balance.step_seconds(2 * GIB)
    assert tied[0] == tied[1] == balance.streamed_bytes(2 * GIB) / 25e9
    assert balance.need_bytes < speed.need_bytes


@pytest.mark.parametrize("side", [256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("gib", [1.25, 2, 4, 8, 12, 24])
@pytest.mark.parametrize("prefer", PREFERENCES)
def test_nothing_that_is_allowed_and_fits_is_cheaper(side, gib, prefer):
    budget, request = int(gib * GIB), Request(side, side)
    ways = {
        choice: stage.within(budget)
        for choice, stage in denoise_stages(MODELS, request, prefer=prefer).items()
    }
    chosen = fit(MODELS, request, budget, prefer=prefer).choice
    fitting = {choice for choice in ways if ways[choice].least_bytes <= budget}
    assert chosen in (fitting or {SMALLEST})
    for other in fitting:
        mine, its = ((ways[c].step_seconds(budget), ways[c].need_bytes) for c in (chosen, other))
        assert mine <= its, other


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_the_report_names_the_pinned_ram_of_a_decode(prefer: Prefer):
    made = plan(1024, 1024, prefer=prefer)
    text = report.text(made)
    # A map of 128 channels at 1024x1024 in bfloat16 is 256 MiB.
    assert ("Pinned RAM: Lean VAE smallest keeps" in text) == (prefer == "smallest")
    ram = made.stage("VAE decode").ram_bytes
    assert 256 * MIB < ram < 320 * MIB if prefer == "smallest" else ram == 0


def test_takes_the_first_that_fits_and_no_smaller():
    """A decode of 4096x4096 at speed needs 12.4 GiB with workspaces, balance 6.4, smallest 1.9."""
    for place, gib in enumerate((14, 8, 6)):
        made = plan(4096, 4096, gib=gib, prefer="speed")
        assert made.verdict == "fits"
        assert made.stage("VAE decode").setting == f"Lean VAE {PREFERENCES[place]}"
        if place:
            easier = vae_stage(MODELS, made.request, PREFERENCES[place - 1])
            assert easier.least_bytes > gib * GIB


def test_what_fits_stays_within_the_budget_whatever_the_request():
    chance, seen = random.Random(0), set()
    for _ in range(400):
        made = fit(
            MODELS,
            Request(16 * chance.randint(1, 300), 16 * chance.randint(1, 300), chance.randint(1, 8)),
            int(chance.uniform(0.5, 24) * GIB),
            prefer=chance.choice(PREFERENCES),
            run=Run(has_encode=chance.random() < 0.3, is_plain=chance.random() < 0.7),
        )
        seen.add(made.verdict)
        budget = made.budget_bytes
        assert budget is not None
        within = all(stage.peak_bytes(budget) <= budget for stage in made.stages)
        assert within == (made.verdict == "fits")
        assert (made.missing_bytes == 0) == (made.verdict == "fits")
        for stage in made.stages:
            assert 0 <= stage.resident_bytes(budget) <= stage.weight_bytes
            assert stage.activation_bytes <= max(stage.stock_bytes, 200 * MIB)
    assert seen == {"fits", "tight", "too large"}


def test_a_larger_budget_streams_no_more():
    streamed = [
        plan(2048, 2048, gib=gib).stage("denoise").streamed_bytes(gib * GIB)
        for gib in (2, 4, 8, 12, 13, 24)
    ]
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] > 10 * GIB and streamed[-1] == 0


def test_weights_and_what_they_come_through_fill_the_budget():
    by_estimate = replace(MODELS, is_dynamic=False)
    stage = plan(1024, 1024, gib=6, models=by_estimate).stage("denoise")
    assert stage.peak_bytes(6 * GIB) == 6 * GIB
    assert stage.resident_bytes(6 * GIB) + stage.buffer_bytes + stage.need_bytes == 6 * GIB
    assert stage.peak_bytes(None) == stage.need_bytes + stage.weight_bytes


@pytest.mark.parametrize("has_prefetch", [False, True])
@pytest.mark.parametrize("gib", [2, 6, 11.5, 11.6, 11.7, 12])
def test_dynamic_vram_takes_whole_pages(gib, has_prefetch):
    """11.46 GiB of weights take 367 pages, of which the last is not full."""
    models = replace(MODELS, has_prefetch=has_prefetch)
    stage = plan(1024, 1024, gib=gib, models=models).stage("denoise")
    budget, page = int(gib * GIB), 32 * MIB
    resident = stage.resident_bytes(budget)
    if resident < stage.weight_bytes:
        assert resident % page == 0
        assert budget - page < stage.peak_bytes(budget) <= budget
    else:
        assert stage.weights_on_card_bytes(budget) == 367 * page > stage.weight_bytes
        assert stage.peak_bytes(budget) <= budget
    # In two buffers that grow by 16 MiB: qkv's 84.4 MiB, or the block's 344.8.
    assert stage.prefetches == has_prefetch
    assert stage.buffer_bytes - stage.copy_bytes == 2 * (352 if has_prefetch else 96) * MIB


def test_blocks_are_prefetched_where_there_is_room_for_two():
    """It must not be what makes a plan too large, nor choose other settings."""
    least = fit(MODELS, Request(1024, 1024), 1).missing_bytes + 1
    assert plan(1024, 1024, gib=least / GIB).verdict == "fits"
    for gib, prefetches in ((least / GIB, False), (0.8, False), (1, True), (8, True)):
        stage = plan(1024, 1024, gib=gib).stage("denoise")
        assert stage.prefetches == prefetches, gib
        without = plan(1024, 1024, gib=gib, models=replace(MODELS, has_prefetch=False))
        assert without.stage("denoise").setting == stage.setting
    by_estimate = plan(1024, 1024, gib=8, models=replace(MODELS, is_dynamic=False))
    assert not by_estimate.stage("denoise").prefetches
    handed_over = plan(1024, 1024, gib=8, run=replace(WHOLE_RUN, is_plain=False))
    assert not handed_over.stage("denoise").prefetches
    request = replace(Request(1024, 1024), controls=(ControlSizes(),))
    controlled = fit(MODELS, request, 8 * GIB).stage("denoise")
    assert controlled.prefetches and controlled.copy_bytes > 112 * MIB, "its blocks copy as before"


def test_cast_weights_and_requests_that_are_not_plain_need_more():
    request = Request(1024, 1024)
    plain, around = (
        denoise_stages(MODELS, request, is_plain=p)[BALANCE].activation_bytes for p in (True, False)
    )
    assert around - plain == 3 * request.stream_bytes + 2 * request.rope_bytes
    quantised = denoise_stages(published_models(weight_bits=8), request)[BALANCE]
    usual = denoise_stages(MODELS, request)[BALANCE]
    assert quantised.workspace_bytes == usual.workspace_bytes
    assert quantised.activation_bytes - usual.activation_bytes == usual.copy_bytes > 112 * MIB
    assert quantised.copy_bytes == 0, "resident weights are copied too"
    matrix = 3840 * 3 * 3840
    for models, stored in ((published_models(weight_bits=8), 1), (MODELS, 2)):
        exact = denoise_stages(replace(models, is_dynamic=False), request)[BALANCE]
        assert exact.buffer_bytes - exact.copy_bytes == pytest.approx(2 * stored * matrix, rel=1e-6)


def test_weights_that_multiply_as_quantised_are_not_cast_and_groups_save_nothing():
    sizes = TransformerSizes(is_whole=True)
    models = replace(published_models(weight_bits=8), denoiser=sizes)
    request = Request(1024, 1024, sizes=sizes)
    stages = denoise_stages(models, request)
    assert not any(stage.is_cast for stage in stages.values())
    # Of streams of 31.875 MiB, a feed-forward takes seven and a third; the others four, and as many
    # chunks of 1088 tokens (7.97 MiB) or of 320 (2.34). Latent, text, rope table: 6.0, or 1.9.
    taken = [round(stage.activation_bytes / MIB) for stage in stages.values()]
    assert taken == [240, 165, 165, 165, 165, 139]
    # Streamed, they wait as stored: 3 x 37.5 of a feed-forward or 56.25 of an attention.
    assert 0 < stages[SPEED].copy_bytes < 3 * 37.5 * MIB


def test_what_would_fit_does_and_a_little_more_does_not():
    made = plan(4096, 2048, batch=16, gib=3)
    assert made.verdict != "fits"
    batch, size = itertools.islice(alternatives(made), 2)
    assert (batch.differs_in, size.differs_in) == ("batch", "size")
    assert (batch.request.width_px, batch.request.height_px) == (4096, 2048)
    count, width, height = batch.request.batch, size.request.width_px, size.request.height_px
    assert report.either([batch, size]) == f"a batch of {count}, or {width}x{height}"
    assert abs(width / height - 2) < 0.1
    for request, fits in (
        (Request(4096, 2048, count), True),
        (Request(4096, 2048, count + 1), False),
        (Request(width, height, 16), True),
        (Request(width + 64, height + 32, 16), False),
    ):
        verdict = fit(MODELS, request, 3 * GIB, prefer="smallest").verdict
        assert (verdict == "fits") == fits, request


def test_smaller_weights_are_named_where_they_help():
    """The host's own text encoder needs its embedding on the card as a whole: 742 MiB in bf16."""
    assert plan(512, 512, gib=0.8).verdict == "fits"
    assert plan(512, 512, gib=0.8, run=Run(has_clip=False)).verdict == "too large"
    small = plan(512, 512, gib=0.4)
    assert small.verdict == "too large"
    assert [other.differs_in for other in alternatives(small)] == ["fp8"]
    in_fp8 = replace(
        published_models(weight_bits=8), text_weight_bytes=MODELS.text_weight_bytes // 2
    )
    assert plan(512, 512, gib=0.4, models=in_fp8, prefer="smallest").verdict == "fits"


@pytest.mark.parametrize("prefer", ["balance", "smallest"])
@pytest.mark.parametrize(("side", "gib"), [(1024, 1), (2048, 1.5), (4096, 4)])
def test_the_whole_run_fits_where_that_is_promised(side: int, gib: float, prefer: Prefer):
    made = plan(side, side, gib=gib, prefer=prefer)
    assert made.verdict == "fits"
    assert all(stage.peak_bytes(made.budget_bytes) <= gib * GIB for stage in made.stages)
    assert "not limited" not in report.text(made)


def test_a_table_that_cannot_stay_in_ram_is_streamed_whole():
    """Bug: with a LoRA on it or in a type that is not gathered, its 742 MiB were not counted."""
    kept, moved = (
        plan(512, 512, gib=0.8, prefer="smallest", models=replace(MODELS, text_table_bytes=count))
        for count in (MODELS.text_table_bytes, 0)
    )
    assert kept.verdict == "fits" and moved.verdict == "too large"
    assert moved.stage("text encode").buffer_bytes >= 742 * MIB > 7 * kept.stages[0].buffer_bytes


def test_a_long_prompt_says_what_its_scores_take():
    """4.5 GiB of them at 4096 tokens, where the attention keeps them; else 1.4 GiB are enough."""
    long = Request(1024, 1024, text_tokens=4096)
    kept = fit(MODELS, long, GIB)
    assert kept.verdict == "too large"
    assert "The text encode: 4.50 GiB of its activations are attention scores" in report.text(kept)
    fused = fit(replace(MODELS, text_bytes_per_score=FUSED_SCORE), long, int(1.4 * GIB))
    assert fused.verdict == "fits"
    assert "scores" not in report.text(fused)
    assert "scores" not in report.text(plan(1024, 1024, gib=1))


def test_planning_takes_less_than_50_ms():
    spent = []
    for _ in range(5):
        start = time.thread_time()
        made = fit(MODELS, Request(8192, 8192, 8), 2 * GIB, run=Run(has_encode=True))
        found = list(alternatives(made))
        spent.append(time.thread_time() - start)
        assert made.verdict != "fits" and found
    assert min(spent) < 0.05


def test_report_is_a_table_of_the_stages():
    made = plan(2048, 2048, gib=8)
    text = report.text(made, copy_bytes_per_s=12.5e9, notes=["last"])
    assert text.startswith("2048x2048, batch 1, 256 text tokens, prefer balance; budget 8.00 GiB")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" |")[0].strip("| ") for row in rows[2:]] == [
        "text encode",
        "denoise",
        "VAE decode",
    ]
    assert len({len(row) for row in rows}) == 1
    streamed = made.stage("denoise").streamed_bytes(8 * GIB)
    assert f"{streamed / 12.5e9:.2f} s at 12.5 GB/s (measured)" in text
    assert "(assumed, not measured), prefetched while the block before computes." in (
        report.text(made)
    )
    alone = plan(2048, 2048, gib=8, models=replace(MODELS, has_prefetch=False))
    assert "not prefetched: up to 68 % of that is added to the step" in report.text(alone)
    assert text.endswith("last")
    assert "streams" not in report.text(plan(1024, 1024, gib=24))


def test_report_says_by_how_much_it_misses():
    made = plan(8192, 8192, gib=2)
    missing = f"{made.missing_bytes / GIB:.2f} GiB short"
    assert made.verdict == "too large" and f"does not fit: {missing}" in report.text(made)
    tight = plan(4096, 4096, batch=4, gib=3)
    assert "tight: " in report.headline(tight)
    assert "no budget" in report.headline(plan(64, 64, gib=None))


def test_json_adds_up():
    made = plan(2048, 2048, gib=8)
    seen = report.as_json(made, others=[Alternative("batch", Request(512, 768, 2))])
    assert seen["verdict"] == "fits"
    assert seen["others"] == [{"differs_in": "batch", "width": 512, "height": 768, "batch_size": 2}]
    for stage in seen["stages"]:
        parts = stage["weights"] + stage["activations"] + stage["workspace"]
        assert parts == stage["peak"] <= seen["budget_bytes"]
    streamed = made.stage("denoise")
    of_page = next(stage for stage in seen["stages"] if stage["name"] == "denoise")
    on_card = streamed.resident_bytes(8 * GIB) + streamed.buffer_bytes
    assert of_page["weights"] == on_card < streamed.weight_bytes


@pytest.mark.parametrize("has_decode", [False, True])
def test_an_encode_counts_like_a_decode(has_decode: bool):
    """The encode alone decided nothing: its picture was encoded at the first preference."""
    request, run = Request(4096, 4096), Run(has_text=False, has_encode=True, has_decode=has_decode)
    ways = {
        name: vae_stages(MODELS, request, is_decode=name == "VAE decode")
        for name in ("VAE encode", *(["VAE decode"] if has_decode else []))
    }
    chosen = set()
    for gib in (16, 8, 6, 4, 3):
        made = fit(MODELS, request, gib * GIB, prefer="speed", run=run)
        least = [max(way[i].least_bytes for way in ways.values()) for i in range(len(PREFERENCES))]
        fitting = [p for p, need in zip(PREFERENCES, least, strict=True) if need <= gib * GIB]
        place = PREFERENCES.index([*fitting, PREFERENCES[-1]][0])
        for name, way in ways.items():
            assert made.stage(name) == way[place], (name, gib)
        chosen.add(place)
    assert len(chosen) > 1
    small = fit(MODELS, request, GIB, prefer="smallest", run=run)
    assert small.verdict != "fits" and small.missing_bytes >= least[-1] - GIB > 0


HELP = Path(__file__).parents[2] / "js" / "docs" / "ZImageFitToVRAM.md"


@pytest.mark.parametrize(
    ("page", "while_sampling", "of_vae", "of_text"),
    [
        (
            HELP,
            r"(\d\.\d) of the activations while sampling",
            r"(\d\.\d) of them and (\d+) MiB for the VAE",
            r"(\d\.\d) of them for the text encoder",
        ),
        (
            HELP.with_suffix("") / "zh.md",
            r"采样时为激活的 (\d\.\d) 倍",
            r"VAE 为激活的 (\d\.\d) 倍加 (\d+) MiB",
            r"文本编码器为激活的 (\d\.\d) 倍",
        ),
    ],
    ids=["en", "zh"],
)
def test_workspaces_are_the_shares_that_the_help_page_names(page, while_sampling, of_vae, of_text):
    words = page.read_text("utf-8")
    told = [re.search(pattern, words) for pattern in (while_sampling, of_vae, of_text)]
    assert all(told), told
    share, vae_share, text_share = (float(found[1]) for found in told if found)
    spare = int(told[1][2]) * MIB if told[1] else 0
    made = plan(2048, 1024, batch=2, gib=None)
    text, denoise, decode = made.stages
    assert denoise.workspace_bytes == pytest.approx(share * denoise.activation_bytes, abs=1)
    assert decode.workspace_bytes == pytest.approx(
        vae_share * decode.activation_bytes + spare, abs=1
    )
    assert text.workspace_bytes == pytest.approx(text_share * text.activation_bytes, abs=1)


def test_errors_by_message():
    with pytest.raises(ValueError, match=r"prefer must be one of .* got 'most'"):
        fit(MODELS, Request(64, 64), GIB, prefer="most")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=re.escape("budget_bytes must be >= 1, got 0")):
        fit(MODELS, Request(64, 64), 0)
    with pytest.raises(ValueError, match=re.escape("tokens must be >= 1, got 0")):
        text_encoder_peak_bytes(0)
    assert text_stage(MODELS, 1).stock_bytes == text_encoder_peak_bytes(1)
