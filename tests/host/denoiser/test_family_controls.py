"""ControlNets of other families behind Apply Gradient Checkpoint, and models that are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pack.testing import attention_models, family_controls
from pack.testing.family_calls import Heard, drawn, forward, given
from pack.testing.family_models import SMALL, built
from pack.testing.lean_models import assert_same, lean, prompt, sample
from pack.testing.video_models import wan_vae

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
SAID = "a ControlNet runs unchanged"


@pytest.fixture(scope="module")
def vae(host: Any) -> Any:
    return wan_vae(dim=4)


def need(host: Any, module: str, name: str) -> None:
    if not hasattr(__import__(module, fromlist=[name]), name):
        pytest.skip(f"ComfyUI {host.version} has no {name}")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("FLUX.1", "flux"), ("Qwen-Image", "qwen_instantx"), ("Qwen-Image", "qwen_fun")],
)
def test_a_controlnet_gives_the_hosts_bits_and_the_log_says_what_it_holds(
    host: Any, vae: Any, caplog: pytest.LogCaptureFixture, name: str, kind: str
) -> None:
    if kind == "qwen_fun":
        need(host, "comfy.controlnet", "QwenFunControlNet")
    caplog.set_level(logging.INFO)
    model = built(name)
    controlled = getattr(family_controls, kind)(vae)
    ours = lean(model)
    plain = sample(ours, **given(name)).latent
    assert SAID not in caplog.text
    got = assert_same(model, ours, **controlled)
    assert not torch.equal(got.latent, plain)
    assert [record.getMessage() for record in caplog.records if SAID in record.getMessage()] == [
        "Apply Gradient Checkpoint: a ControlNet runs unchanged, not in pieces: its peak is "
        "not lowered"
    ]


def planned(model: Any, prompts: list[Any]) -> float:
    """The bytes that the host would plan with for one call."""
    import comfy.sampler_helpers
    from comfy.patcher_extension import WrapperExecutor, WrappersMP

    def plan(model: Any, shape: Any, conds: Any, model_options: Any = None) -> float:
        return model.model.memory_required(list(shape))

    wrappers = model.get_all_wrappers(WrappersMP.PREPARE_SAMPLING)
    conds = {"positive": comfy.sampler_helpers.convert_cond(prompts)}
    executor = WrapperExecutor.new_executor(plan, wrappers)
    return executor.execute(model, (1, 16, 512, 512), conds, model_options=model.model_options)


def test_with_a_controlnet_the_host_plans_with_its_own_estimate(vae: Any) -> None:
    """Names the bug: it planned with what our blocks hold, and the ControlNet holds more."""
    model, name = built("FLUX.1"), "FLUX.1"
    ours, plain = lean(model), given(name)["positive"]
    assert planned(ours, plain) < planned(model, plain)
    controlled = family_controls.flux(vae)["positive"]
    patched = family_controls.uso(ours, vae)
    assert planned(ours, controlled) == planned(patched, plain) == planned(model, plain)


@pytest.mark.parametrize("is_first", [False, pytest.param(True, marks=pytest.mark.once)])
@pytest.mark.parametrize(
    ("name", "kind"), [("FLUX.1", "uso"), ("Qwen-Image", "diffsynth"), ("Wan", "uni3c")]
)
def test_a_model_patch_gives_the_hosts_bits(
    host: Any, vae: Any, caplog: pytest.LogCaptureFixture, name: str, kind: str, is_first: bool
) -> None:
    """The host's nodes make them; two steps, as they keep what they encoded."""
    if kind == "uni3c":
        pytest.importorskip("comfy.ldm.wan.uni3c")
    caplog.set_level(logging.INFO)
    model, put = built(name), getattr(family_controls, kind)
    stock = put(model, vae)
    ours = lean(put(model, vae)) if is_first else put(lean(model), vae)
    asked = {**given(name), "steps": 2}
    got = assert_same(stock, ours, **asked)
    assert not torch.equal(got.latent, sample(model, **asked).latent)
    assert SAID in caplog.text


def test_wan_fun_control_and_its_reference() -> None:
    """The control's latent is part of the model's input; the reference's tokens come first."""
    name = "Wan Fun control"
    model = built(name)
    heard = Heard(model)
    latent = drawn(1, 32, 3, 36, 36, seed=4)
    references = [drawn(1, 16, 1, 36, 36, seed=seed) for seed in (5, 6)]
    asked, results = given(name), []
    for reference in references:
        more = {"concat_latent_image": latent, "reference_latents": [reference]}
        asked["positive"] = asked["negative"] = prompt(**more)
        results.append(assert_same(model, heard.model, **asked).latent)
    assert heard.reasons == [] and not torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_wan_with_a_camera(dtype: torch.dtype) -> None:
    model = built("Wan camera", dtype)
    heard = Heard(model)
    more = {"camera_conditions": drawn(1, 24, 3, 288, 288, dtype=dtype, seed=4)}
    wanted = forward(model, "Wan camera", **more)
    assert torch.equal(forward(heard.model, "Wan camera", **more), wanted) and heard.reasons == []
    assert not torch.equal(wanted, forward(model, "Wan camera"))


@torch.inference_mode()
def test_wan_with_references_in_the_stream() -> None:
    """Bernini's: the first layer makes tokens of them too."""
    model = built("Wan")
    heard = Heard(model)
    more = {"context_latents": [drawn(1, 16, 1, 36, 36, seed=4), drawn(1, 16, 2, 20, 36, seed=5)]}
    wanted = forward(model, "Wan", **more)
    assert torch.equal(forward(heard.model, "Wan", **more), wanted) and heard.reasons == []


REFUSED: dict[str, dict[str, Any]] = {
    "WAN21_Vace": {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96},
    "WAN21_HuMo": {"model_type": "humo"},
    "WAN22_Animate": {"model_type": "animate", "in_dim": 36},
    "WAN22_S2V": {"model_type": "s2v", "enable_adain": False},
    "WAN21_SCAIL": {"model_type": "scail", "in_dim": 20},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_with_blocks_of_its_own_is_refused_by_name(kind: str) -> None:
    """Wan's VACE and others: the node says what it works on, and leaves the model as it was."""
    import comfy.supported_models

    config = {**SMALL["Wan"].config, **REFUSED[kind]}
    made = getattr(comfy.supported_models, kind)(dict(config))
    made.set_inference_dtype(torch.float32, None)
    made.unet_config = config
    with torch.device("meta"):
        model = attention_models.patcher(made.get_model({}, "", device="meta"))
    with pytest.raises(
        ValueError, match=rf"works on Z-Image, .* Wan, .* this model is {kind}: use"
    ):
        lean(model)
    assert model.object_patches == {} and not any(model.wrappers.values())
