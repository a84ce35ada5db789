"""U-Nets behind Apply Gradient Checkpoint, beside the host's other nodes and other packs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pack.testing import attention_models
from pack.testing.attention_models import draw, sample
from pack.testing.stock_forward import installed
from pack.testing.unet_models import Heard, built, forward, lean

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
BLOCK = "diffusion_model.input_blocks.1.1.transformer_blocks.0"


def deep_shrink(model: Any, *, after_skip: bool) -> Any:
    import comfy_extras.nodes_model_downscale as nodes

    return nodes.PatchModelAddDownscale.execute(
        model, 1, 2.0, 0.0, 1.0, after_skip, "bicubic", "bicubic"
    ).args[0]


def free_u(model: Any) -> Any:
    import comfy_extras.nodes_freelunch as nodes

    return nodes.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2).args[0]


def control_of(model: Any) -> dict[str, Any]:
    """A prompt's request for a ControlNet of the host's class."""
    import comfy.cldm.cldm as cldm
    import comfy.controlnet
    import comfy.ops

    others = ("out_channels", "transformer_depth_output", "use_temporal_attention", "dtype")
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k not in others}
    net: Any = cldm.ControlNet(
        hint_channels=3, **config, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    control = comfy.controlnet.ControlNet(
        net.eval(), load_device=torch.device("cpu"), manual_cast_dtype=torch.float32
    )
    control.set_cond_hint(torch.rand(1, 3, 24 * 8, 16 * 8, generator=generator), 0.8)
    return {"control": control, "control_apply_to_uncond": True}


@pytest.mark.parametrize("prefer", ["balance", "smallest"])
@pytest.mark.parametrize("after_skip", [True, False])
@torch.inference_mode()
def test_deep_shrink_free_u_and_a_controlnet(prefer: Any, after_skip: bool) -> None:
    """A whole sampling with the host's nodes on either side of ours."""
    model = attention_models.stable_diffusion()

    def both(model: Any) -> Any:
        return free_u(deep_shrink(model, after_skip=after_skip))

    def controlled(model: Any) -> torch.Tensor:
        return sample(model, **control_of(model))

    wanted = controlled(both(model))
    for ours in (both(lean(model, prefer=prefer)), lean(both(model), prefer=prefer)):
        got = controlled(ours)
        assert (got - wanted).norm() / wanted.norm() < 1e-5
    parts = sample(model), sample(both(model)), wanted
    assert all((a - b).norm() / b.norm() > 0.01 for a, b in itertools.pairwise(parts))


class Half(torch.nn.Module):
    """Another pack's layer around one of the host's."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **more: Any) -> torch.Tensor:
        return self.layer(*args, **more) * 0.5


@pytest.mark.parametrize(
    "place", [f"{BLOCK}.attn2", f"{BLOCK}.ff", "diffusion_model.input_blocks.1.0.emb_layers"]
)
@torch.inference_mode()
def test_layers_that_other_packs_replace(place: str) -> None:
    """Names the bug: they were ignored after our node, and stayed in the model before it."""
    model = attention_models.stable_diffusion()
    half = Half(model.get_model_object(place))

    def halved(model: Any) -> Any:
        clone = model.clone()
        clone.add_object_patch(place, half)
        return clone

    plain, wanted = sample(model), sample(halved(model))
    for ours in (halved(lean(model)), lean(halved(model))):
        assert (sample(ours) - wanted).norm() / wanted.norm() < 1e-5
        assert torch.equal(sample(model), plain)
    assert not torch.equal(plain, wanted)


@torch.inference_mode()
def test_a_block_that_another_pack_has_copied() -> None:
    """Names the bug: the node failed with a KeyError."""
    model = attention_models.stable_diffusion()
    clone = model.clone()
    clone.add_object_patch(BLOCK, copy.deepcopy(model.get_model_object(BLOCK)))
    wanted = sample(clone)
    assert (sample(lean(clone)) - wanted).norm() / wanted.norm() < 1e-5


@torch.inference_mode()
def test_packs_find_blocks_by_their_class() -> None:
    """As reference-only ControlNets do. Names the bug: they found none, and did nothing."""
    import comfy.ldm.modules.attention as attention

    model = attention_models.stable_diffusion()
    ours, seen = lean(model), []

    def parts(module: Any) -> Iterator[Any]:
        yield module
        for child in module.children():
            yield from parts(child)

    def found() -> list[Any]:
        kind = attention.BasicTransformerBlock
        return [part for part in parts(model.model.diffusion_model) if isinstance(part, kind)]

    hosts = len(found())
    with installed(ours):
        blocks = found()
        forward = blocks[0].forward
        blocks[0].forward = lambda x, **more: seen.append(1) or forward(x, **more)
        latent, time, text = draw(1, 4, 24, 16, seed=1), torch.ones(1), draw(1, 7, 48, seed=2)
        model.model.diffusion_model(latent, time, text)
    assert len(blocks) == hosts and seen == [1]


def test_gradients_beside_an_attention_that_is_replaced_at_one_place() -> None:
    """Names the bug: a block was computed again with the place of the last one."""
    model = built("SDXL")
    denoiser = model.model.diffusion_model.requires_grad_()
    replaced = {"attn1": {("middle", 0): lambda q, k, v, options: q * 0.5}}
    options = {"transformer_options": {"patches_replace": replaced}}

    def gradients(which: Any) -> dict[str, torch.Tensor]:
        denoiser.zero_grad()
        forward(which, "SDXL", sides=(16, 24), **options).square().mean().backward()
        return {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}

    wanted, got = gradients(model), gradients(lean(model))
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(got[key], value, rtol=1e-4, atol=1e-7), key


@torch.inference_mode()
def test_the_node_says_which_blocks_it_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    """As in the x4 upscaler. Names the bug: they were left to the host without a word."""
    caplog.set_level("INFO")
    model = built("SD1.5", disable_self_attentions=[True, False, False, False])
    heard = Heard(model)
    assert torch.equal(forward(heard.model, "SD1.5"), forward(model, "SD1.5"))
    assert "5 of 16 transformer blocks are of an unknown kind" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("comes_first", [False, pytest.param(True, marks=pytest.mark.once)])
@pytest.mark.parametrize("prefer", ["balance", "smallest"])
def test_torch_compile_of_the_host(comes_first: bool, prefer: Any) -> None:
    """Names the bug: torch refused to trace what keeps the skip tensors."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = attention_models.stable_diffusion()

    def compiled(model: Any) -> Any:
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="aot_eager")
        return clone

    def ours(model: Any) -> Any:
        return lean(model, prefer=prefer)

    wanted = sample(model)
    both = ours(compiled(model)) if comes_first else compiled(ours(model))
    try:
        runs = [sample(both) for _ in range(2)]
    finally:
        torch.compiler.reset()
    for run in runs:
        assert (run - wanted).norm() / wanted.norm() < 1e-5
    assert torch.equal(sample(model), wanted)
