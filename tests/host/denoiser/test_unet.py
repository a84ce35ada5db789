"""SDXL, Stable Diffusion 1.5 and Kolors behind Apply Gradient Checkpoint: the host's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.testing import attention_models
from pack.testing.families import FAMILIES
from pack.testing.unet_models import CONFIGS, TEXT, Heard, built, drawn, forward, lean

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

BLOCKS = {"SDXL": 2 * 1 + 2 * 2 + 2 + 3 * 1 + 3 * 2, "SD1.5": 6 + 1 + 9}
MAPS = {"SDXL": 6 + 2 + 9 + 2, "SD1.5": 8 + 2 + 12 + 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefer", ["speed", "balance", "smallest"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_has_the_hosts_bits(name: str, prefer: Any, dtype: torch.dtype) -> None:
    model = built(name, dtype)
    wanted = forward(model, name)
    for options in ({}, {"chunk_tokens": 0, "head_groups": 0}):
        heard = Heard(model, prefer=prefer, **options)
        got = forward(heard.model, name)
        assert torch.equal(got, wanted), (got - wanted).abs().max()
        assert heard.reasons == []
    assert wanted.isfinite().all() and wanted.float().std() > 0
    assert torch.equal(forward(model, name), wanted)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_blocks_and_maps_are_replaced_on_the_clone_alone(name: str) -> None:
    from pack.nodes.host.denoiser.replaced import Replaced

    model = built(name)
    patches = lean(model).object_patches
    blocks = [n for n in patches if ".transformer_blocks." in n]
    assert (len(blocks), len(patches) - len(blocks)) == (BLOCKS[name], MAPS[name])
    assert not any(isinstance(m, Replaced) for m in model.model.diffusion_model.modules())
    twice = lean(lean(model)).object_patches
    assert twice.keys() == patches.keys()
    assert not any(isinstance(part.stock[0], Replaced) for part in twice.values())
    assert set(lean(model, blocks="main layers").object_patches) == set(blocks)
    second = lean(model, blocks="every second").object_patches
    assert list(second) == blocks[::2]
    with pytest.raises(ValueError, match="blocks must be one that this model has"):
        lean(model, blocks="refiners only")


@pytest.mark.parametrize("sides", [(48, 40), (36, 44)])
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_batches_agree_up_to_rounding(name: str, sides: tuple[int, int]) -> None:
    """Also where a level's sides are odd, so that no map is twice the one below."""
    model = built(name)
    heard = Heard(model)
    wanted = forward(model, name, batch=2, sides=sides)
    got = forward(heard.model, name, batch=2, sides=sides)
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    assert heard.reasons == []


@torch.inference_mode()
def test_a_u_net_of_a_pack_that_derives_the_hosts() -> None:
    """As the packs of Kolors do: the text, 4096 wide, is projected before the host's forward."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel

    class Kolors(openaimodel.UNetModel):
        def forward(self, x: Any, timesteps: Any = None, context: Any = None, *args: Any,
                    **kwargs: Any) -> torch.Tensor:  # fmt: skip
            context = torch.nn.functional.linear(context, self.to_text)
            return super().forward(x, timesteps, context, *args, **kwargs)

    model = built("SDXL")
    denoiser = model.model.diffusion_model
    config = {k: v for k, v in CONFIGS["SDXL"].items() if k != "image_model"}
    kolors: Any = Kolors(**config, dtype=torch.float32, operations=_operations())
    kolors.load_state_dict(denoiser.state_dict())
    kolors.to_text = drawn(TEXT, 96, dtype=torch.float32, seed=7) * 0.1
    model.model.diffusion_model = kolors.eval()
    text = drawn(1, 256, 96, dtype=torch.float32, seed=8)
    wanted = forward(model, "SDXL", text=text)
    heard = Heard(model)
    assert torch.equal(forward(heard.model, "SDXL", text=text), wanted) and heard.reasons == []


def _operations() -> Any:
    import comfy.ops

    return comfy.ops.disable_weight_init


PATCHES: dict[str, Any] = {
    "attn1_patch": lambda n, context, value, options: (1.1 * n, context, value),
    "attn1_output_patch": lambda n, options: 1.1 * n,
    "middle_patch": lambda x, options: 1.1 * x,
    "attn2_patch": lambda n, context, value, options: (n, 1.1 * context, value),
    "attn2_output_patch": lambda n, options: 1.1 * n,
}


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_patches_inside_a_block_go_to_the_hosts_block(name: str, kind: str) -> None:
    model = built(name)
    options = {"transformer_options": {"patches": {kind: [PATCHES[kind]]}}}
    heard = Heard(model)
    wanted = forward(model, name, **options)
    assert torch.equal(forward(heard.model, name, **options), wanted)
    assert set(heard.reasons) == {f"another node patches the attention ({kind})"}
    assert len(heard.reasons) == BLOCKS[name] and not torch.equal(wanted, forward(model, name))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
@pytest.mark.parametrize("place", [("middle", 0), ("input", 5, 0)])
@torch.inference_mode()
def test_a_replaced_attention(kind: str, place: tuple[Any, ...], batch: int) -> None:
    """As perturbed attention and IP-Adapter do it: attn1's blocks run as the host's, no others."""
    model, seen = built("SDXL"), []

    def replacement(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> Any:
        plain = {
            key: value for key, value in options.items() if key not in ("wrappers", "callbacks")
        }
        seen.append((q.clone(), k.clone(), v.clone(), plain))
        return q * 0.5 + v.mean(1, keepdim=True)

    options = {"transformer_options": {"patches_replace": {kind: {place: replacement}}}}
    heard = Heard(model)
    wanted, given = forward(model, "SDXL", batch=batch, **options), list(seen)
    seen.clear()
    got = forward(heard.model, "SDXL", batch=batch, **options)
    assert (got - wanted).norm() / wanted.norm() < 1e-5 and (batch > 1 or torch.equal(got, wanted))
    count = 2 if place[0] == "middle" else 1
    reason = "another node replaces the attention (attn1)"
    assert heard.reasons == ([reason] * count if kind == "attn1" else [])
    assert len(seen) == len(given) == count and not torch.equal(wanted, forward(model, "SDXL"))
    for ours, hosts in zip(seen, given, strict=True):
        assert ours[3] == hosts[3]
        assert all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(ours[:3], hosts[:3], strict=True)
        )


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_patches_around_the_blocks_get_the_hosts_maps(name: str) -> None:
    """FreeU's among them, which change what the skip tensors hold."""
    model = built(name)
    calls: list[Any] = []

    def outer(h: torch.Tensor, skip: torch.Tensor, options: Any) -> Any:
        calls.append((options["block"], h.clone(), skip.clone()))
        return h * 1.1, skip * 0.9

    def inner(h: torch.Tensor, options: Any) -> torch.Tensor:
        calls.append((options["block"], h.clone()))
        return h * 1.05

    for patches in (
        {"output_block_patch": [outer]},
        {"input_block_patch_after_skip": [inner]},
        {"input_block_patch": [inner], "output_block_patch": [outer]},
    ):
        options = {"transformer_options": {"patches": patches}}
        calls.clear()
        wanted, seen = forward(model, name, **options), list(calls)
        calls.clear()
        assert torch.equal(forward(lean(model), name, **options), wanted)
        assert len(calls) == len(seen) > 8
        for got, given in zip(calls, seen, strict=True):
            assert got[0] == given[0]
            assert all(torch.equal(a, b) for a, b in zip(got[1:], given[1:], strict=True))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_controlnet_adds_to_the_hosts_maps(name: str) -> None:
    """A ControlNet adds to the skip tensors in place, a T2I-Adapter to what the inputs leave."""
    model = built(name)
    shapes: list[Any] = []

    def note(h: torch.Tensor, skip: torch.Tensor, options: Any) -> Any:
        shapes.append(skip.shape)
        return h, skip

    plain = forward(model, name, transformer_options={"patches": {"output_block_patch": [note]}})

    def control() -> dict[str, Any]:
        added = [drawn(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate(shapes)]
        return {"output": added[::-1], "middle": [added[0].new_ones(1)], "input": [added[-1]]}

    wanted = forward(model, name, control=control())
    assert torch.equal(forward(lean(model), name, control=control()), wanted)
    assert not torch.equal(wanted, plain)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_lora_and_weights_in_fp8_give_the_hosts_bits(host: Any, name: str) -> None:
    model = built(name)
    layers = (torch.nn.Linear, torch.nn.Conv2d)
    weights = {
        f"diffusion_model.{n}.weight": module.weight
        for n, module in model.model.diffusion_model.named_modules()
        if isinstance(module, layers) and "_block" in n
    }
    change = {
        key: (drawn(*weight.shape, dtype=torch.float32, seed=i) * 0.02,)
        for i, (key, weight) in enumerate(weights.items())
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
        if isinstance(module, layers):
            module.weight.data = module.weight.data.to(torch.float8_e4m3fn)
            module.comfy_cast_weights = True
    assert torch.equal(forward(lean(stored), name), forward(stored, name))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_hosts_and_blocks_are_computed_again(name: str) -> None:
    """With gradients each part is the host's under torch.utils.checkpoint."""
    model = built(name)
    denoiser = model.model.diffusion_model.requires_grad_()

    def gradients(which: Any) -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        forward(which, name, sides=(16, 24)).square().mean().backward()
        return {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}

    wanted = gradients(model)
    heard = Heard(model)
    got = gradients(heard.model)
    assert got.keys() == wanted.keys() and heard.reasons == []
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, rtol=1e-4, atol=1e-7), key


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_hooks_and_forwards_of_other_packs_run(name: str) -> None:
    model = built(name)
    denoiser = model.model.diffusion_model
    block = next(m for n, m in denoiser.named_modules() if n.endswith("transformer_blocks.0"))
    heard = Heard(model)
    wanted = forward(model, name)
    seen: list[Any] = []
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in (block.attn2, denoiser.output_blocks[0][0].in_layers[2])
    ]
    try:
        assert torch.equal(forward(heard.model, name), wanted)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2
    assert set(heard.reasons) == {"another node changed a block", "another node changed a ResBlock"}


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_cancelled_forward_leaves_the_model_as_it_was(host: Any, name: str) -> None:
    model = built(name)
    ours = lean(model)
    wanted = forward(ours, name)

    def cancel(h: torch.Tensor, skip: torch.Tensor, options: Any) -> Any:
        host.model_management.interrupt_current_processing(True)
        return h, skip

    options = {"patches": {"output_block_patch": [cancel]}}
    try:
        with pytest.raises(host.model_management.InterruptProcessingException):
            forward(ours, name, transformer_options=options)
    finally:
        host.model_management.interrupt_current_processing(False)
    assert torch.equal(forward(ours, name), wanted)
    assert torch.equal(forward(model, name), wanted)


@pytest.mark.parametrize("prefer", ["balance", "smallest"])
@torch.inference_mode()
def test_a_whole_sampling_with_two_prompts_agrees(host: Any, prefer: Any) -> None:
    model = attention_models.stable_diffusion()
    wanted = attention_models.sample(model)
    got = attention_models.sample(lean(model, prefer=prefer))
    assert (got - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize(
    ("family", "call", "prefer", "share"),
    [
        ("SDXL", 1, "speed", 0.65),
        ("SDXL", 1, "balance", 0.47),
        ("SD1.5", 1, "balance", 0.39),
    ],
)
def test_the_peak_at_full_width_is_such_a_share_of_the_hosts(
    family: str, call: int, prefer: Any, share: float
) -> None:
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint
    from pack.testing.families import CALLS, measure

    def patched(patcher: Any) -> Any:
        return ApplyGradientCheckpoint.execute(patcher, prefer=prefer).args[0]

    asked = CALLS[family][call]
    wanted = measure(FAMILIES[family], asked).peak_bytes
    assert measure(FAMILIES[family], asked, patched=patched).peak_bytes <= share * wanted
