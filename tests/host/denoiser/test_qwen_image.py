"""Qwen-Image behind Apply Gradient Checkpoint: the host's bits at a fraction of the peak."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from pack.testing import family_models
from pack.testing.family_models import SMALL, TEXT, Heard, drawn, forward
from pack.testing.lean_models import lean

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

NAME = "Qwen-Image"
CONFIG = SMALL[NAME].config
built = functools.partial(family_models.built, NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefer", ["speed", "balance", "smallest"])
@torch.inference_mode()
def test_has_the_hosts_bits(prefer: Any, dtype: torch.dtype) -> None:
    model = built(dtype)
    wanted = forward(model)
    for options in ({}, {"chunk_tokens": 0, "head_groups": 0}):
        heard = Heard(model, prefer=prefer, **options)
        got = forward(heard.model)
        assert torch.equal(got, wanted), (got - wanted).abs().max()
        assert heard.reasons == []
    assert wanted.float().std() > 0 and torch.equal(forward(model), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["index", "negative_index", "offset", "index_timestep_zero"])
@torch.inference_mode()
def test_reference_pictures_of_the_edit_models(method: str, dtype: torch.dtype) -> None:
    """The newer edit models modulate the references by a time of their own."""
    model = built(dtype)
    heard = Heard(model)
    given = {
        "ref_latents": [drawn(1, 16, 1, 24, 32, dtype=dtype, seed=5)] * 2,
        "ref_latents_method": method,
    }
    wanted = forward(model, **given)
    assert torch.equal(forward(heard.model, **given), wanted) and heard.reasons == []
    assert not torch.equal(wanted, forward(model))


@torch.inference_mode()
def test_batches_agree_up_to_rounding() -> None:
    model = built()
    heard = Heard(model)
    for more in ({}, {
        "ref_latents": [drawn(2, 16, 1, 24, 32, seed=5)],
        "ref_latents_method": "index_timestep_zero",
    }):  # fmt: skip
        wanted, got = forward(model, batch=2, **more), forward(heard.model, batch=2, **more)
        assert (got - wanted).norm() / wanted.norm() < 1e-5 and heard.reasons == []


@torch.inference_mode()
def test_every_block_and_the_last_norm_are_replaced_on_the_clone_alone() -> None:
    from pack.nodes.host.denoiser.replaced import Replaced

    model = built()
    ours = lean(model)
    names = {n.partition(".")[2] for n in ours.object_patches}
    blocks = {f"transformer_blocks.{i}" for i in range(CONFIG["num_layers"])}
    assert names == {*blocks, "norm_out"}
    assert not any(isinstance(m, Replaced) for m in model.model.diffusion_model.modules())
    again = lean(ours, blocks="every second").object_patches
    assert {n.partition(".")[2] for n in again} == {"transformer_blocks.0"}
    assert type(next(iter(again.values())).stock[0]).__module__ == "comfy.ldm.qwen_image.model"
    with pytest.raises(ValueError, match="blocks must be one that this model has"):
        lean(model, blocks="refiners only")


@torch.inference_mode()
def test_a_mask_and_patches_of_the_attention_go_to_the_hosts_block() -> None:
    model = built()
    mask = torch.ones(1, TEXT, dtype=torch.long)
    mask[:, 60:] = 0
    heard = Heard(model)
    wanted = forward(model, attention_mask=mask)
    assert torch.equal(forward(heard.model, attention_mask=mask), wanted)
    assert set(heard.reasons) == {"the request has encoder_hidden_states_mask"}

    def patch(q: Any, k: Any, v: Any, **more: Any) -> dict[str, Any]:
        return {"q": 1.1 * q}

    options = {"transformer_options": {"patches": {"attn1_patch": [patch]}}}
    heard = Heard(model)
    assert torch.equal(forward(heard.model, **options), forward(model, **options))
    assert heard.reasons and all("attn1_patch" in reason for reason in heard.reasons)


@torch.inference_mode()
def test_controls_patches_between_blocks_and_replaced_blocks_get_what_the_host_gives() -> None:
    model = built()
    heard = Heard(model)
    kept: list[torch.Tensor] = []

    def louder(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        out = more["original_block"](args)
        kept.append(args["img"])  # the block makes new streams, so this may be held
        return {**out, "img": 1.1 * out["img"] + 0.1 * args["img"]}

    def between(args: dict[str, Any]) -> dict[str, Any]:
        return {**args, "img": args["img"] + 0.1}

    options = {
        "patches_replace": {"dit": {("double_block", 1): louder}},
        "patches": {"double_block": [between]},
    }

    def given() -> dict[str, Any]:
        add = drawn(1, 900, 256, seed=6)
        return {"control": {"input": [add, None]}, "transformer_options": dict(options)}

    wanted = forward(model, **given())
    assert torch.equal(forward(heard.model, **given()), wanted) and heard.reasons == []
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(wanted, forward(model))


@torch.inference_mode()
def test_a_lora_and_weights_in_fp8_give_the_hosts_bits(host: Any) -> None:
    model = built()
    linears = {
        f"diffusion_model.{n}.weight": module.weight
        for n, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("_blocks." in n or "norm_out" in n)
    }
    change = {
        key: (drawn(*weight.shape, seed=i) * 0.05,)
        for i, (key, weight) in enumerate(linears.items())
    }
    patched = model.clone()
    assert set(patched.add_patches(change, 0.8)) == set(change)
    host.model_management.load_models_gpu([patched])
    wanted = forward(patched)
    ours = lean(patched)
    host.model_management.load_models_gpu([ours])
    assert torch.equal(forward(ours), wanted)
    host.model_management.unload_all_models()
    assert not torch.equal(forward(model), wanted)

    stored = built(torch.bfloat16)
    for module in stored.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    assert torch.equal(forward(lean(stored)), forward(stored))


def test_with_gradients_blocks_are_checkpointed_and_gradients_are_the_hosts(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    heard = Heard(model)
    model.model.diffusion_model.requires_grad_()
    monkeypatch.setattr(host.model_management, "in_training", True)
    weight = model.model.diffusion_model.transformer_blocks[0].attn.to_out[0].weight
    grads, kept = [], []
    for each in (model, heard.model):
        weight.grad, sizes = None, []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t
        ):
            loss = forward(each, side=16).square().mean()
        loss.backward()
        grads.append(weight.grad.clone())
        kept.append(sum(sizes))
    assert torch.equal(*grads) and grads[0].norm() > 0 and heard.reasons == []
    assert kept[1] < 0.5 * kept[0]


@torch.inference_mode()
def test_a_cancelled_forward_leaves_the_model_as_it_was(host: Any) -> None:
    model = built()
    ours = lean(model)
    wanted = forward(ours)

    def cancel(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        host.model_management.interrupt_current_processing(True)
        return more["original_block"](args)

    options = {"patches_replace": {"dit": {("double_block", 1): cancel}}}
    try:
        with pytest.raises(host.model_management.InterruptProcessingException):
            forward(ours, transformer_options=options)
    finally:
        host.model_management.interrupt_current_processing(False)
    assert torch.equal(forward(ours), wanted)
    assert torch.equal(forward(model), wanted)
