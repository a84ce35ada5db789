"""Wan behind Apply Gradient Checkpoint: the host's bits at a fraction of the peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.testing import family_models
from pack.testing.family_models import SMALL, Heard, drawn, forward
from pack.testing.lean_models import lean, offloaded, prompt, sample

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

NAME = "Wan 2.1 14B"
KINDS = [name for name in SMALL if name.startswith("Wan")]
CONFIG = SMALL["Wan"].config


def built(dtype: torch.dtype = torch.float32, kind: str = "Wan") -> Any:
    """A ModelPatcher of the host's own class with seeded weights."""
    return family_models.built(kind, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefer", ["speed", "balance", "smallest"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_has_the_hosts_bits(kind: str, prefer: Any, dtype: torch.dtype) -> None:
    model = built(dtype, kind)
    wanted = forward(model)
    for options in ({}, {"chunk_tokens": 0, "head_groups": 0}):
        heard = Heard(model, prefer=prefer, **options)
        got = forward(heard.model)
        assert torch.equal(got, wanted), (got - wanted).abs().max()
        assert heard.reasons == []
    assert wanted.float().std() > 0 and torch.equal(forward(model), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_time_for_each_frame_and_one_for_each_token(dtype: torch.dtype) -> None:
    """Wan 2.2 5B gives frames that are known the time 0; more than a frame's tokens go together."""
    model = built(dtype)
    heard = Heard(model)
    for times, reasons in (
        (torch.tensor([[0.0, 0.7, 0.7]]), []),
        (torch.tensor([[0.0, 0.7]]), []),  # two runs for three frames, the second cut short
        (torch.rand(1, 3 * 18 * 18), ["each token is modulated by itself"]),
    ):
        wanted = forward(model, times=times)
        assert torch.equal(forward(heard.model, times=times), wanted)
        assert sorted(set(heard.reasons)) == reasons
    assert not torch.equal(wanted, forward(model))


@torch.inference_mode()
def test_batches_agree_up_to_rounding() -> None:
    for kind in ("Wan", "Wan i2v"):
        model = built(kind=kind)
        heard = Heard(model)
        wanted, got = forward(model, batch=2), forward(heard.model, batch=2)
        assert (got - wanted).norm() / wanted.norm() < 1e-5 and heard.reasons == []


@torch.inference_mode()
def test_every_block_and_the_head_are_replaced_on_the_clone_alone() -> None:
    from pack.nodes.host.denoiser.replaced import Replaced

    model = built()
    ours = lean(model)
    names = {n.partition(".")[2] for n in ours.object_patches}
    blocks = {f"blocks.{i}" for i in range(CONFIG["num_layers"])}
    assert names == {*blocks, "patch_embedding.forward", "head"}
    assert not any(isinstance(m, Replaced) for m in model.model.diffusion_model.modules())
    again = lean(ours, blocks="every second").object_patches
    assert {n.partition(".")[2] for n in again} == {"blocks.0"}
    with pytest.raises(ValueError, match="blocks must be one that this model has"):
        lean(model, blocks="refiners only")


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


@pytest.mark.parametrize("kind", ["attn1_patch", "attn2_patch"])
@torch.inference_mode()
def test_patches_of_the_attention_go_to_the_hosts_block(kind: str) -> None:
    model = built()
    heard = Heard(model)

    def patch(args: dict[str, Any]) -> torch.Tensor:
        return 1.1 * args["x"]

    options = {"transformer_options": {"patches": {kind: [patch]}}}
    wanted = forward(model, **options)
    assert torch.equal(forward(heard.model, **options), wanted)
    assert heard.reasons and all(kind in reason for reason in heard.reasons)


@torch.inference_mode()
def test_replaced_blocks_get_what_the_host_gives_and_may_keep_it() -> None:
    model = built()
    heard = Heard(model)
    kept: list[torch.Tensor] = []

    def louder(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        out = more["original_block"](args)
        kept.append(args["img"])
        return {**out, "img": 1.1 * out["img"] + 0.1 * args["img"]}

    options = {"patches_replace": {"dit": {("double_block", 1): louder}}}
    wanted = forward(model, transformer_options=dict(options))
    assert torch.equal(forward(heard.model, transformer_options=dict(options)), wanted)
    assert torch.equal(kept[0], kept[1]) and heard.reasons == []
    assert not torch.equal(wanted, forward(model))


@torch.inference_mode()
def test_a_lora_also_of_a_blocks_own_weight_and_weights_in_fp8_give_the_hosts_bits(
    host: Any,
) -> None:
    """ "modulation" is a weight of the block itself, which the host patches by the block's name."""
    model = built()
    weights = {
        f"diffusion_model.{name}": weight
        for name, weight in model.model.diffusion_model.named_parameters()
        if name.startswith(("blocks.", "head.")) and name.endswith((".weight", ".modulation"))
    }
    change = {
        key: (drawn(*weight.shape, seed=i) * 0.05,)
        for i, (key, weight) in enumerate(weights.items())
    }
    patched = model.clone()
    assert set(patched.add_patches(change, 0.8)) == set(change)
    host.model_management.load_models_gpu([patched])
    wanted = forward(patched)
    ours = lean(patched)
    host.model_management.load_models_gpu([ours])
    heard = Heard(ours)
    host.model_management.load_models_gpu([heard.model])
    assert torch.equal(forward(heard.model), wanted)

    def patch(args: dict[str, Any]) -> torch.Tensor:
        return args["x"]

    # The host's own block has the patched weight too.
    options = {"transformer_options": {"patches": {"attn1_patch": [patch]}}}
    assert torch.equal(forward(heard.model, **options), wanted) and heard.reasons
    host.model_management.unload_all_models()
    assert not torch.equal(forward(model), wanted)

    stored = built(torch.bfloat16)
    for module in stored.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    assert torch.equal(forward(lean(stored)), forward(stored))


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_the_host_loads_and_patches_the_first_layer(host: Any, is_offloaded: bool) -> None:
    """Names the bug: a module in its place was loaded by a name that the model has not."""
    model = built()
    given = {"noise": drawn(1, 16, 3, 36, 36, seed=1), "positive": prompt(), "negative": prompt()}
    place = offloaded if is_offloaded else lambda model: model
    plain = sample(place(lean(model)), **given).latent  # loads it
    assert torch.equal(sample(place(model), **given).latent, plain)
    name = "diffusion_model.patch_embedding.weight"
    change = drawn(*model.model.state_dict()[name].shape, seed=3)
    patched = model.clone()
    assert patched.add_patches({name: (change,)}, 0.5)
    host.model_management.unload_all_models()
    got = sample(place(lean(patched)), **given).latent
    assert torch.equal(sample(place(patched), **given).latent, got)
    assert not torch.equal(got, plain)


def test_a_compute_dtype_that_is_chosen_behind_the_node() -> None:
    """Names the bug: the first layer rounded to the dtype that the node had seen."""
    model = built(torch.bfloat16)
    given = {"noise": drawn(1, 16, 3, 36, 36, seed=1), "positive": prompt(), "negative": prompt()}
    stock, ours = model.clone(), lean(model)
    for each in (stock, ours):
        each.set_model_compute_dtype(torch.float32)
    assert torch.equal(sample(ours, **given).latent, sample(stock, **given).latent)


def test_with_gradients_blocks_are_checkpointed_and_gradients_are_the_hosts(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    heard = Heard(model)
    model.model.diffusion_model.requires_grad_()
    monkeypatch.setattr(host.model_management, "in_training", True)
    block = model.model.diffusion_model.blocks[0]
    watched = (block.ffn[2].weight, block.modulation)
    grads, kept = [], []
    for each in (model, heard.model):
        model.model.diffusion_model.zero_grad()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.nbytes), t)[1], lambda t: t
        ):
            loss = forward(each, side=16).square().mean()
        loss.backward()
        grads.append([weight.grad.clone() for weight in watched])
        kept.append(sum(sizes))
    assert all(map(torch.equal, *grads)) and all(g.norm() > 0 for g in grads[0])
    assert kept[1] < 0.6 * kept[0] and heard.reasons == []


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
