"""Fit to VRAM on the real host, on the CPU: what it plans, refuses and applies."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.nodes.prefer import PREFERENCES
from pack.testing import lean_models
from pack.testing.lean_models import latent, prepare, prompt, sample
from pack.testing.vae_models import kl_vae

pytestmark = pytest.mark.usefixtures("host")
GIB = 2**30
QUESTION = {
    "width": 1024, "height": 1024, "batch_size": 1, "budget_gib": 8, "prefer": "balance",
    "has_vae": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder)


def fit(model: Any, **options: Any) -> tuple[Any, Any, str]:
    from pack.nodes.fit_to_vram import FitToVRAM

    return FitToVRAM.execute(model, **options).args[:3]


def wire(side: int = 48, *, channels: int = 16, batch: int = 1) -> dict[str, torch.Tensor]:
    """What an empty latent node gives."""
    return {"samples": torch.zeros(batch, channels, side, side)}


def test_same_picture_and_the_model_is_left_as_it_was(loaded):
    patched, vae, report = fit(loaded.model, vae=loaded.vae, latent=wire(), conditioning=prompt())
    assert not loaded.model.object_patches and not loaded.model.wrappers
    assert torch.equal(sample(patched).latent, sample(loaded.model).latent)
    assert vae is loaded.vae  # a TAESD stays as it is
    assert "384x384, batch 1, 7 text tokens, prefer balance" in report
    assert "nothing is enforced: no NVIDIA" in report
    assert "denoise" in report and "VAE decode" in report


def test_latent_and_prompt_go_before_the_widgets(loaded):
    _, _, report = fit(loaded.model, width=2048, height=2048, latent=wire(64, batch=3))
    assert report.startswith("512x512, batch 3, 512 text tokens")
    _, vae, report = fit(loaded.model, width=640, height=480, batch_size=2)
    assert report.startswith("640x480, batch 2") and vae is None


def test_refuses_a_latent_of_other_channels(loaded):
    with pytest.raises(ValueError, match=r"latent must have 16 channels .* got shape \[1, 4,"):
        fit(loaded.model, latent=wire(channels=4))


def test_refuses_another_family_by_its_name(host):
    other = lean_models.built("Lumina2", lean_models.LUMINA_2)
    with pytest.raises(ValueError, match=r"plans for Z-Image, this model is Lumina2"):
        fit(other)
    assert not other.object_patches


def test_refuses_what_cannot_run_and_names_what_would(loaded):
    with pytest.raises(ValueError, match=r"does not fit: .* short; what would fit: .*\dx\d"):
        fit(loaded.model, budget_gib=1.0, width=16384, height=16384)
    with pytest.raises(ValueError, match="does not fit"):  # below the text encoder's embedding
        fit(loaded.model, budget_gib=0.25)


def test_planned_again_when_the_sampling_begins(loaded, caplog):
    """A larger latent than the plan's, a longer prompt and a LoRA that came after the node."""
    patched, _, _ = fit(loaded.model, budget_gib=2.0)
    with_lora = patched.clone()
    name = "diffusion_model.layers.0.feed_forward.w1.weight"
    matrix = torch.zeros(loaded.model.model.diffusion_model.layers[0].feed_forward.w1.weight.shape)
    with_lora.add_patches({name: (matrix,)})
    with caplog.at_level(logging.INFO):
        sample(with_lora, noise=latent(32))
    planned = [r.getMessage() for r in caplog.records if "256x256, batch 1, 7 text" in r.message]
    assert planned and "budget 2.00 GiB: fits" in planned[0]
    from pack.nodes.host.fit.budget import weight_bytes

    assert weight_bytes(with_lora) == loaded.model.model_size() + matrix.nbytes


def test_a_sampling_that_cannot_fit_fails_before_its_first_step(loaded):
    patched, _, _ = fit(loaded.model, budget_gib=1.0)
    huge = torch.zeros(1, 16, 16384, 16384, device="meta")
    with pytest.raises(ValueError, match=r"Fit to VRAM: .* does not fit"):
        prepare(patched, huge)


@pytest.mark.parametrize("error", [RuntimeError, InterruptedError])
def test_undone_after_an_exception_or_cancel(loaded, error):
    from comfy.patcher_extension import WrappersMP

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("while sampling")

    factor = loaded.model.model.memory_usage_factor
    for kind in (WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE):
        patched, _, _ = fit(loaded.model, budget_gib=2.0)
        patched.add_wrapper_with_key(kind, "test", fail)
        with pytest.raises(error, match="while sampling"):
            sample(patched)
        assert loaded.model.model.memory_usage_factor == factor
        patched.remove_wrappers_with_key(kind, "test")
        assert torch.equal(sample(patched).latent, sample(loaded.model).latent)


def test_the_host_is_told_the_need_while_it_plans(loaded):
    from comfy.patcher_extension import WrappersMP

    seen: list[float] = []

    def noted(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(model.model.memory_required(list(shape)))
        return executor(model, shape, *args, **kwargs)

    patched, _, _ = fit(loaded.model, budget_gib=2.0)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", noted)
    stock = loaded.model.model.memory_required([1, 16, 512, 512])
    prepare(patched, torch.empty(1, 16, 512, 512, device="meta"))
    assert 0 < seen[0] < stock == loaded.model.model.memory_required([1, 16, 512, 512])


def test_other_clones_of_the_model_are_not_touched(loaded):
    """A branch without the node and one with another budget, sampled in turn."""
    first, _, _ = fit(loaded.model, budget_gib=2.0, prefer="smallest")
    other, _, _ = fit(loaded.model, budget_gib=3.0, prefer="speed")
    plain = loaded.model.clone()
    whole = sample(plain)
    assert (sample(first).heads, sample(other).heads, sample(plain).heads) == (
        {1}, whole.heads, whole.heads,
    )  # fmt: skip


def watched(model: Any, batches: set[int]) -> Any:
    """Notes the samples of each call of the denoiser."""
    from comfy.patcher_extension import WrappersMP

    def note(executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batches.add(x.shape[0])
        return executor(x, *args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", note)
    return model


def planned_prompts(caplog: Any) -> int:
    """Of the last plan of a sampling of 256x256."""
    texts = [r.getMessage() for r in caplog.records if "256x256, batch 1, " in r.getMessage()]
    found = re.search(r"batch 1, (\d+) prompts at a time", texts[-1])
    return int(found[1]) if found else 1


@pytest.mark.parametrize(
    ("cfg", "sampler", "prompts", "together"),
    [
        (1.0, "euler", 1, 1),
        (3.0, "euler", 1, 2),
        (1.0, "euler_cfg_pp", 1, 2),  # asks for the negative prompt whatever cfg is
        (1.0, "euler", 2, 2),  # Conditioning (Combine)
        (3.0, "euler", 2, 3),
    ],
)
def test_all_prompts_of_a_call_count(loaded, caplog, cfg, sampler, prompts, together):
    batches: set[int] = set()
    patched = watched(fit(loaded.model, budget_gib=2.0)[0], batches)
    positive = [entry for seed in range(prompts) for entry in prompt(seed=seed)]
    with caplog.at_level(logging.INFO):
        sample(patched, cfg=cfg, sampler=sampler, noise=latent(32), positive=positive)
    assert (max(batches), planned_prompts(caplog)) == (together, together)


def test_the_prompts_of_another_guider_count(loaded, caplog):
    """DualCFGGuider leaves `cfg` at 1 and computes three prompts."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualCFG

    batches: set[int] = set()
    guider = Guider_DualCFG(watched(fit(loaded.model, budget_gib=2.0)[0], batches))
    guider.set_conds(prompt(), prompt(seed=1), prompt(seed=2))
    guider.set_cfg(2.0, 3.0)
    sampler, noise = comfy.samplers.sampler_object("euler"), latent(32)
    with caplog.at_level(logging.INFO), torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.0]))
    assert (max(batches), planned_prompts(caplog)) == (3, 3)


def needed(model: Any, **more: Any) -> float:
    """Bytes that the host is told to keep for a sampling of 2048x2048 pixels."""
    from comfy.patcher_extension import WrappersMP

    needs = []

    def noted(executor: Any, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        needs.append(model.model.memory_required(list(shape)))
        return executor(model, shape, *args, **kwargs)

    noting = model.clone()
    noting.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", noted)
    prepare(noting, torch.empty(1, 16, 256, 256, device="meta"), **more)
    return needs[0]


def test_patches_and_reference_pictures_are_reckoned_with(loaded, caplog):
    """Patches hold the picture's part of the stream; references lengthen it."""
    patched, _, _ = fit(loaded.model, budget_gib=2.0, prefer="smallest")
    plain = needed(patched)
    with_patch = patched.clone()
    with_patch.set_model_double_block_patch(lambda args: {})
    assert 1.2 * plain < needed(with_patch) < 2 * plain
    with caplog.at_level(logging.INFO):
        needed(patched, reference_latents=[torch.empty(1, 16, 256, 256, device="meta")])
    assert "2048x2048, batch 1, 16384 reference tokens, 7 text tokens" in caplog.text


def test_features_of_reference_pictures_are_planned():
    """Of the prompt of a sampling; and of the connected one, whose pictures the plan left out."""
    model = lean_models.built("ZImage", {**lean_models.Z_IMAGE, "siglip_feat_dim": 40})
    seen = SimpleNamespace(
        image_sizes=[(3, 2048, 2048)], last_hidden_state=torch.empty(1, 16384, 4)
    )
    more: dict[str, Any] = {"reference_latents": [torch.empty(1, 16, 64, 64, device="meta")]}
    patched, _, report = fit(model, budget_gib=2.0, conditioning=prompt(**more))
    assert report.startswith("1024x1024, batch 1, 1024 reference tokens, 7 text tokens")
    few = needed(patched, **more)
    assert 1.5 * few < needed(patched, **more, clip_vision_outputs=[None, seen]) < 2.5 * few
    # What was connected does not count for the prompt that is sampled.
    assert needed(patched) < few


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_the_blocks_run_the_choice_that_was_planned(loaded, monkeypatch, prefer):
    """speed ran as balance, whose choice the blocks began with."""
    from pack.nodes.denoiser.plan import DenoiserChoice
    from pack.nodes.host.denoiser import block

    chosen = []

    def noted(sizes: Any, batch: int, lengths: Any, choice: DenoiserChoice, **options: Any) -> Any:
        chosen.append(choice)
        return plan_for(sizes, batch, lengths, choice, **options)

    plan_for = block.plan_for
    patched, _, report = fit(loaded.model, budget_gib=24.0, prefer=prefer)
    monkeypatch.setattr(block, "plan_for", noted)
    sample(patched)
    assert set(chosen) == {DenoiserChoice(prefer)}
    assert f"Apply Gradient Checkpoint: prefer {prefer} " in report


def test_tight_asks_for_smaller_groups_and_keeps_the_picture(loaded):
    """smallest takes one head at a time, and the result is the same to the bit."""
    patched, _, report = fit(loaded.model, prefer="smallest")
    assert "Apply Gradient Checkpoint: prefer smallest" in report
    assert torch.equal(sample(patched).latent, sample(loaded.model).latent)
    assert sample(patched).heads == {1}


def test_the_last_of_two_nodes_counts(loaded, caplog):
    first, _, _ = fit(loaded.model, budget_gib=3.0)
    second, _, _ = fit(first, budget_gib=2.0)
    with caplog.at_level(logging.INFO):
        assert torch.equal(sample(second).latent, sample(loaded.model).latent)
    text = " ".join(r.getMessage() for r in caplog.records)
    assert (
        "budget 2.00 GiB" in text and "batch 1, 7 text tokens, prefer balance; budget 3" not in text
    )


def test_apply_gradient_checkpoint_behind_it_counts_and_it_says_so(loaded, caplog):
    both = lean_models.lean(fit(loaded.model)[0])
    with caplog.at_level(logging.INFO):
        assert torch.equal(sample(both).latent, sample(loaded.model).latent)
    assert any(
        "a later node replaced this plan" in record.getMessage() for record in caplog.records
    )


def test_training_is_not_planned_and_nothing_is_said_of_it(loaded, caplog):
    """Train LoRA calls the model's wrappers too, and tells the host how to load."""
    from comfy.patcher_extension import WrappersMP

    def as_training(executor: Any, *args: Any, **kwargs: Any) -> Any:
        return executor(*args, **{**kwargs, "force_full_load": True})

    patched = loaded.model.clone()
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", as_training)
    patched, _, _ = fit(patched, budget_gib=2.0)
    with caplog.at_level(logging.INFO):
        sample(patched)
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Fit to VRAM")]
    assert not any(
        "replaced this plan" in text or "384x384, batch 1, 7 text" in text for text in said
    )


def test_a_video_vae_stays_stock(loaded):
    other = kl_vae()
    other.latent_dim = 3
    _, vae, _ = fit(loaded.model, vae=other)
    assert vae is other


def test_a_stock_vae_is_planned_with_its_own_dtype_and_weights(loaded):
    """In float32 on Intel it was planned with half the bytes, and with the published weights."""
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.host.fit.inputs import planner_for

    def decode(vae: Any) -> Any:
        planner = planner_for(
            loaded.model, Request(384, 384), named_bytes=0, prefer="speed", vae=vae, latent=None,
            conditioning=prompt(),
            clip=None,
        )  # fmt: skip
        return planner.plan(planner.request, None).stage("VAE decode")

    stock = kl_vae()
    stock.device = torch.device("xpu")  # no more than a name: nothing runs
    stage = decode(stock)
    assert stage.setting == "ComfyUI's own"
    assert stage.activation_bytes == 2 * decode(None).activation_bytes
    assert stage.weight_bytes == stock.patcher.model_size()


def test_the_vae_takes_what_fits(loaded):
    """At 2048x2048, speed needs more than 3 GiB and smallest less: chosen at the call."""
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.planner import Planner
    from pack.nodes.fit.stages import published_models
    from pack.nodes.vae.plan import VaeCall, VaeSizes

    call = VaeCall(VaeSizes(), 2048, 2048, dtype_bytes=2, has_ram=True)
    planner = Planner(published_models(), Request(2048, 2048), 0, 0, "speed")
    chosen = [planner.vae_choice(call, int(room * GIB)).prefer for room in (8, 2.5, 1)]
    assert chosen == ["speed", "balance", "smallest"]


def test_speed_of_a_copy_is_not_measured_without_a_card(loaded):
    from pack.nodes.host.fit import budget

    assert budget.copy_bytes_per_s(loaded.model.load_device) is None
    assert budget.room_bytes(loaded.model.load_device) is None
    assert budget.floor_bytes(loaded.model) == 0
    assert budget.limit_weights(loaded.model, 1) is None


@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        b"[]",
        b"{}",
        json.dumps({**QUESTION, "prefer": "nonsense"}).encode(),
        json.dumps({**QUESTION, "width": None}).encode(),
        json.dumps({**QUESTION, "budget_gib": 1e400}).encode(),
    ],
)
def test_a_question_that_cannot_be_answered_is_refused_as_bad(host, body):
    status, told = answered(body)
    assert status == 400
    assert told.keys() == {"error", "words"} and told["error"]


def test_a_question_of_the_page_is_answered(host):
    status, told = answered(json.dumps(QUESTION).encode())
    assert status == 200
    assert told["stages"]


def answered(body: bytes) -> tuple[int, Any]:
    """Status and JSON of the route's answer to a POST of that body."""
    from aiohttp import StreamReader
    from aiohttp.base_protocol import BaseProtocol
    from aiohttp.test_utils import make_mocked_request
    from pack.nodes.host.fit import route

    async def ask() -> Any:
        payload = StreamReader(BaseProtocol(asyncio.get_running_loop()), 2**16)
        payload.feed_data(body)
        payload.feed_eof()
        return await route.answer(make_mocked_request("POST", "/", payload=payload))

    with ThreadPoolExecutor(1) as server:  # whose loop has a thread of its own
        response = server.submit(asyncio.run, ask()).result()
    return response.status, json.loads(response.text)
