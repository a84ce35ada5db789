"""Other families behind Apply Gradient Checkpoint: the host's bits, block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.testing.family_calls import (
    Heard,
    attention_patch,
    drawn,
    forward,
)
from pack.testing.family_models import (
    LAST,
    NAMES,
    SMALL,
    blocks,
    built,
)
from pack.testing.lean_models import lean

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefer", ["speed", "balance", "smallest"])
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_has_the_hosts_bits(name: str, prefer: Any, dtype: torch.dtype) -> None:
    model = built(name, dtype)
    wanted = forward(model, name)
    for options in ({}, {"chunk_tokens": 0, "head_groups": 0}):
        heard = Heard(model, prefer=prefer, **options)
        got = forward(heard.model, name)
        assert torch.equal(got, wanted), (got - wanted).abs().max()
        assert heard.reasons == []
    assert wanted.float().std() > 0 and torch.equal(forward(model, name), wanted)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_batches_agree_up_to_rounding(name: str) -> None:
    model = built(name)
    heard = Heard(model)
    wanted, got = forward(model, name, batch=2), forward(heard.model, name, batch=2)
    assert (got - wanted).norm() / wanted.norm() < 1e-5 and heard.reasons == []


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_every_block_and_the_last_layer_are_replaced_on_the_clone_alone(name: str) -> None:
    from pack.nodes.host.denoiser.replaced import Replaced

    model = built(name)
    ours = lean(model)
    denoiser = model.model.diffusion_model
    names = {n.partition(".")[2] for n in ours.object_patches}
    around = {LAST[name]} if hasattr(denoiser, LAST[name]) else set()
    assert names == {*blocks(name, model), *around}
    assert not any(isinstance(m, Replaced) for m in denoiser.modules())
    for again, wanted in (
        (lean(ours), names),
        (lean(ours, blocks="main layers"), names - around),
        (lean(ours, blocks="every second"), {f"{stack}.0" for stack in SMALL[name].stacks}),
    ):
        parts = {n.partition(".")[2]: part for n, part in again.object_patches.items()}
        assert parts.keys() == wanted
        for path in wanted:
            assert parts[path].stock[0] is denoiser.get_submodule(path)
    with pytest.raises(ValueError, match="blocks must be one that this model has"):
        lean(model, blocks="refiners only")


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_lora_also_of_a_blocks_own_weight_and_weights_in_fp8_give_the_hosts_bits(
    host: Any, name: str
) -> None:
    """Wan's "modulation" is a weight of the block itself, patched by the block's name."""
    model = built(name)
    weights = {
        f"diffusion_model.{path}": weight
        for path, weight in model.model.diffusion_model.named_parameters()
        if path.startswith((*SMALL[name].stacks, f"{LAST[name]}."))
        and path.endswith((".weight", ".modulation"))
    }
    change = {
        key: (drawn(*weight.shape, seed=i) * 0.05,)
        for i, (key, weight) in enumerate(weights.items())
    }
    patched = model.clone()
    assert set(patched.add_patches(change, 0.8)) == set(change)
    host.model_management.load_models_gpu([patched])
    wanted = forward(patched, name)
    heard = Heard(patched)
    host.model_management.load_models_gpu([heard.model])
    assert torch.equal(forward(heard.model, name), wanted) and heard.reasons == []
    # The host's own block has the patched weights too.
    options = {"transformer_options": {"patches": {"attn1_patch": [attention_patch(name, 1)]}}}
    assert torch.equal(forward(heard.model, name, **options), wanted) and heard.reasons
    host.model_management.unload_all_models()
    assert not torch.equal(forward(model, name), wanted)

    stored = built(name, torch.bfloat16)
    for module in stored.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    assert torch.equal(forward(lean(stored), name), forward(stored, name))


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_cancelled_forward_leaves_the_model_as_it_was(host: Any, name: str) -> None:
    model = built(name)
    ours = lean(model)
    wanted = forward(ours, name)

    def cancel(args: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
        host.model_management.interrupt_current_processing(True)
        return more["original_block"](args)

    kind = "single_block" if len(SMALL[name].stacks) > 1 else "double_block"
    options = {"patches_replace": {"dit": {(kind, 1): cancel}}}
    try:
        with pytest.raises(host.model_management.InterruptProcessingException):
            forward(ours, name, transformer_options=options)
    finally:
        host.model_management.interrupt_current_processing(False)
    assert torch.equal(forward(ours, name), wanted)
    assert torch.equal(forward(model, name), wanted)
