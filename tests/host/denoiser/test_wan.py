"""Wan behind Apply Gradient Checkpoint: what no other family has."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pack.testing import family_calls, family_models
from pack.testing.family_calls import (
    Heard,
    drawn,
    given,
)
from pack.testing.lean_models import fail, lean, offloaded, sample

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
built = functools.partial(family_models.built, "Wan")


def forward(model: Any, **more: Any) -> torch.Tensor:
    return family_calls.forward(model, "Wan", **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_time_for_each_frame_and_one_for_each_token(dtype: torch.dtype) -> None:
    """Wan 2.2 5B gives frames that are known the time 0; more than a frame's tokens go together."""
    model = built(dtype)
    heard = Heard(model)
    for times, reasons in (
        (torch.tensor([[0.0, 0.7, 0.7]]), []),
        (torch.tensor([[0.0, 0.7]]), []),  # two runs for three frames, the second cut short
        (torch.rand(1, 3 * 18 * 18), ["each token has its own modulation"]),
    ):
        wanted = forward(model, times=times)
        assert torch.equal(forward(heard.model, times=times), wanted)
        assert sorted(set(heard.reasons)) == reasons
    assert not torch.equal(wanted, forward(model))


@torch.inference_mode()
def test_a_forward_that_another_clone_left_on_a_block_and_on_the_first_layer() -> None:
    """Names the bug: the lean block took it for its own, now and after that clone was gone."""
    model = built()
    wanted = forward(model)
    denoiser, other, found = model.model.diffusion_model, model.clone(), []
    layers = {"blocks.0": denoiser.blocks[0], "patch_embedding": denoiser.patch_embedding}
    for name, layer in layers.items():
        own = layer.forward
        louder = lambda *given, own=own, **named: 1.1 * own(*given, **named)  # noqa: E731
        other.add_object_patch(f"diffusion_model.{name}.forward", louder)
    other.patch_model(load_weights=False)
    found.append(Heard(model))
    other.unpatch_model(unpatch_weights=False)
    found.append(Heard(model))
    for heard in found:
        assert torch.equal(forward(heard.model), wanted) and heard.reasons == []


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_the_host_loads_and_patches_the_first_layer(host: Any, is_offloaded: bool) -> None:
    """Names the bug: a module in its place was loaded by a name that the model has not."""
    model = built()
    asked = given("Wan")
    place = offloaded if is_offloaded else lambda model: model
    plain = sample(place(lean(model)), **asked).latent  # loads it
    assert torch.equal(sample(place(model), **asked).latent, plain)
    name = "diffusion_model.patch_embedding.weight"
    change = drawn(*model.model.state_dict()[name].shape, seed=3)
    patched = model.clone()
    assert patched.add_patches({name: (change,)}, 0.5)
    host.model_management.unload_all_models()
    got = sample(place(lean(patched)), **asked).latent
    assert torch.equal(sample(place(patched), **asked).latent, got)
    assert not torch.equal(got, plain)


def test_a_compute_dtype_that_is_chosen_behind_the_node() -> None:
    """Names the bug: the first layer rounded to the dtype that the node had seen."""
    model = built(torch.bfloat16)
    asked = given("Wan")
    stock, ours = model.clone(), lean(model)
    for each in (stock, ours):
        each.set_model_compute_dtype(torch.float32)
    assert torch.equal(sample(ours, **asked).latent, sample(stock, **asked).latent)


@torch.inference_mode()
def test_the_first_layer_is_replaced_for_the_time_of_a_call() -> None:
    """And no longer where the call fails."""
    from pack.nodes.host.denoiser.wan_ends import LeanPatches

    model, seen = built(), []
    layer = model.model.diffusion_model.patch_embedding

    def look(module: Any, given: Any) -> None:
        seen.append(type(module.forward) is LeanPatches)

    with layer.register_forward_pre_hook(look):
        wanted = forward(model)
        assert torch.equal(forward(lean(model)), wanted)
        assert torch.equal(forward(lean(model, blocks="main layers")), wanted)
        options = {"transformer_options": {"optimized_attention_override": fail}}
        with pytest.raises(RuntimeError, match="in the middle"):
            forward(lean(model), **options)
    assert seen == [False, True, False, True] and "forward" not in vars(layer)


@pytest.mark.once
@torch.inference_mode()
def test_a_bypassed_lora_on_the_first_layer(host: Any) -> None:
    """It is another forward of that layer, which then runs as the host's, and the log says so."""
    if not hasattr(host.sd, "load_bypass_lora_for_models"):
        pytest.skip(f"ComfyUI {host.version} bypasses no LoRA")
    model = built()
    weight = model.model.diffusion_model.patch_embedding.weight
    down, up = drawn(4, *weight.shape[1:], seed=3), 0.05 * drawn(256, 4, 1, 1, 1, seed=4)
    name = "diffusion_model.patch_embedding.lora"
    lora = {f"{name}_A.weight": down, f"{name}_B.weight": up}
    patched = host.sd.load_bypass_lora_for_models(model, None, lora, 1.0, 0.0)[0]
    heard, plain = Heard(patched), sample(model, **given("Wan")).latent
    got = sample(heard.model, **given("Wan")).latent
    assert torch.equal(got, sample(patched, **given("Wan")).latent)
    assert not torch.equal(got, plain) and set(heard.reasons) == {
        "another node changed patch_embedding"
    }
