"""FLUX.1 and FLUX.2 behind Apply Gradient Checkpoint: the host's bits at a fraction of the peak."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from pack.testing.flux_models import CONFIGS, MAIN, TOKENS, built, drawn, forward, lean

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefer", ["speed", "balance", "smallest"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_has_the_hosts_bits(name: str, prefer: Any, dtype: torch.dtype) -> None:
    model = built(name, dtype)
    wanted = forward(model, name)
    for options in ({}, {"chunk_tokens": 0, "head_groups": 0}):
        got = forward(lean(model, prefer=prefer, **options), name)
        assert torch.equal(got, wanted), (got - wanted).abs().max()
    assert wanted.float().std() > 0 and torch.equal(forward(model, name), wanted)


@pytest.mark.parametrize("name", MAIN)
@torch.inference_mode()
def test_half_precision_is_made_finite(name: str) -> None:
    model = built(name, torch.float16)
    for stack, layer in (("double_blocks", "txt_mlp.2"), ("single_blocks", "linear2")):
        block = getattr(model.model.diffusion_model, stack)[0]
        block.get_submodule(layer).weight.mul_(1000)
    wanted = forward(model, name)
    heard = Heard(model)
    assert torch.equal(forward(heard.model, name), wanted) and heard.reasons == []
    assert wanted.isfinite().all()


class Heard:
    """A lean model whose parts note the reasons for which the host's own ran."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.reasons = lean(model, **options), []
        for part in self.model.object_patches.values():
            part._on_handover = self.reasons.append


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_every_block_and_the_last_layer_are_replaced_on_the_clone_alone(name: str) -> None:
    from pack.nodes.host.denoiser.replaced import Replaced

    model = built(name)
    names = {n.partition(".")[2] for n in lean(model).object_patches}
    config = CONFIGS[name]
    blocks = [f"double_blocks.{i}" for i in range(config["depth"])]
    blocks += [f"single_blocks.{i}" for i in range(config["depth_single_blocks"])]
    has_final = hasattr(model.model.diffusion_model, "final_layer")
    assert names == {*blocks, *(["final_layer"] if has_final else [])}
    assert not any(isinstance(m, Replaced) for m in model.model.diffusion_model.modules())
    twice = lean(lean(model))
    assert not any(isinstance(p.stock[0], Replaced) for p in twice.object_patches.values())
    main = lean(model, blocks="every second").object_patches
    assert {n.partition(".")[2] for n in main} == {"double_blocks.0", "single_blocks.0"}
    with pytest.raises(ValueError, match="blocks must be one that this model has"):
        lean(model, blocks="refiners only")


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_batches_agree_up_to_rounding(name: str) -> None:
    model = built(name)
    heard = Heard(model)
    wanted, got = forward(model, name, batch=2), forward(heard.model, name, batch=2)
    assert (got - wanted).norm() / wanted.norm() < 1e-5 and heard.reasons == []


@torch.inference_mode()
def test_references_and_those_with_a_time_of_their_own() -> None:
    """FLUX.2's references are tokens; "index_timestep_zero" modulates them apart: the host's."""
    model = built("FLUX.2")
    heard = Heard(model)
    given = {"ref_latents": [drawn(1, 128, 12, 16, dtype=torch.float32, seed=5)]}
    assert torch.equal(forward(heard.model, "FLUX.2", **given), forward(model, "FLUX.2", **given))
    assert heard.reasons == []
    if "index_timestep_zero" not in inspect.getsource(type(model.model.diffusion_model)):
        return  # hosts before 0.18.0 have one time for all
    given["ref_latents_method"] = "index_timestep_zero"
    assert torch.equal(forward(heard.model, "FLUX.2", **given), forward(model, "FLUX.2", **given))
    assert heard.reasons


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_mask_and_patches_of_the_attention_go_to_the_hosts_block(name: str) -> None:
    model = built(name)
    tokens = TOKENS[name] + 900
    mask = torch.zeros(1, 1, tokens, tokens)
    mask[..., 5:9] = -torch.inf
    heard = Heard(model)
    wanted = forward(model, name, attention_mask=mask)
    assert torch.equal(forward(heard.model, name, attention_mask=mask), wanted)
    assert set(heard.reasons) == {"the request has attn_mask"}
    for kind in ("attn1_patch", "attn1_output_patch"):
        if kind == "attn1_patch":
            patch: Any = lambda q, k, v, **more: {"q": 1.1 * q}  # noqa: E731
        else:
            patch = lambda attended, options: 1.1 * attended  # noqa: E731
        options = {"transformer_options": {"patches": {kind: [patch]}}}
        heard = Heard(model)
        assert torch.equal(forward(heard.model, name, **options), forward(model, name, **options))
        assert heard.reasons and all(kind in reason for reason in heard.reasons)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_control_and_a_replaced_block_get_what_the_host_gives(name: str) -> None:
    model = built(name)
    heard = Heard(model)
    add = drawn(1, 900, 256, dtype=torch.float32, seed=6)

    def louder(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        out = more["original_block"](args)
        return {**out, "img": 1.1 * out["img"]}

    replaced = {"dit": {("double_block", 0): louder, ("single_block", 1): louder}}

    def given() -> dict[str, Any]:
        return {
            "control": {"input": [add.clone(), None], "output": [0.5 * add]},
            "transformer_options": {"patches_replace": replaced},
        }

    wanted = forward(model, name, **given())
    assert torch.equal(forward(heard.model, name, **given()), wanted) and heard.reasons == []
    assert not torch.equal(wanted, forward(model, name))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_lora_and_weights_in_fp8_give_the_hosts_bits(host: Any, name: str) -> None:
    model = built(name)
    linears = {
        f"diffusion_model.{n}.weight": module.weight
        for n, module in model.model.diffusion_model.named_modules()
        if isinstance(module, torch.nn.Linear) and "_blocks." in n
    }
    change = {
        key: (drawn(*weight.shape, dtype=torch.float32, seed=i) * 0.05,)
        for i, (key, weight) in enumerate(linears.items())
    }
    patched = model.clone()
    assert set(patched.add_patches(change, 0.8)) == set(change)
    host.model_management.load_models_gpu([patched])
    wanted = forward(patched, name)
    ours = lean(patched)
    host.model_management.load_models_gpu([ours])
    assert torch.equal(forward(ours, name), wanted)
    host.model_management.unload_all_models()
    assert not torch.equal(forward(model, name), wanted)

    stored = built(name, torch.bfloat16)
    for module in stored.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    assert torch.equal(forward(lean(stored), name), forward(stored, name))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_gradients_the_hosts_blocks_run_and_the_node_says_so(name: str) -> None:
    """They write over what a backward pass needs; checkpointed, its gradients would be wrong."""
    model = built(name)
    heard = Heard(model)
    model.model.diffusion_model.requires_grad_()
    assert torch.equal(forward(heard.model, name), forward(model, name))
    assert set(heard.reasons) == {"gradients are on"}


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_cancelled_forward_leaves_the_model_as_it_was(host: Any, name: str) -> None:
    model = built(name)
    ours = lean(model)
    wanted = forward(ours, name)

    def cancel(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        host.model_management.interrupt_current_processing(True)
        return more["original_block"](args)

    options = {"patches_replace": {"dit": {("single_block", 1): cancel}}}
    try:
        with pytest.raises(host.model_management.InterruptProcessingException):
            forward(ours, name, transformer_options=options)
    finally:
        host.model_management.interrupt_current_processing(False)
    assert torch.equal(forward(ours, name), wanted)
    assert torch.equal(forward(model, name), wanted)
