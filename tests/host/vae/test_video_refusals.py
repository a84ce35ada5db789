"""What Lean VAE leaves to the host of the Wan class, and what it says then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pack.testing.vae_models import lean
from pack.testing.video_models import VERSIONS, Version, wan_vae

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level("INFO", logger="pack.nodes")
    return lambda: "\n".join(r.message for r in caplog.records if r.message.startswith("Lean VAE"))


@pytest.mark.parametrize("version", VERSIONS)
@torch.inference_mode()
def test_an_unknown_subclass_passes_through(said: Any, version: Version) -> None:
    vae = wan_vae(version=version)

    class Wider(type(vae.first_stage_model)):
        pass

    model = Wider(dim=16, z_dim=16, temperal_downsample=[False, True, True])
    vae.first_stage_model = model.eval()
    assert lean(vae) is vae
    reason = "it is a Wider, not the WanVAE of Wan 2.1 or that of Wan 2.2"
    assert f"this VAE is left unchanged: {reason}" in said()


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.1", "decoder.middle.0"),
        ("2.2", "encoder.downsamples.1.avg_shortcut"),
        ("2.2", "decoder.upsamples.0"),
    ],
)
@torch.inference_mode()
def test_a_replaced_forward_passes_through(said: Any, version: Version, name: str) -> None:
    vae = wan_vae(version=version)
    block = vae.first_stage_model.get_submodule(name)
    block.forward = block.forward
    assert lean(vae) is vae
    assert f"{name} is a {type(block).__name__} of another kind" in said()


@pytest.mark.parametrize("setting", ["factor_s", "factor_t", "in_channels", "group_size"])
def test_another_shortcut_passes_through(said: Any, setting: str) -> None:
    vae = wan_vae(version="2.2")
    group = vae.first_stage_model.encoder.downsamples[1]
    setattr(group.avg_shortcut, setting, 3)
    assert lean(vae) is vae
    assert "encoder.downsamples.1 is a Down_ResidualBlock of another kind" in said()


def _replace_decode(model: Any) -> str:
    stock = model.decode
    model.decode = lambda *args: 0.5 * stock(*args)
    return "its decode was replaced"


def _wrap_rows(model: Any) -> str:
    conv = model.decoder.upsamples[3].resample[1]
    conv.padding_mode, conv._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    return "decoder.upsamples.3.resample.1 is a Conv2d of another kind"


def _convolve_otherwise(model: Any) -> str:
    """As packs do that make pictures tileable."""
    conv = model.decoder.conv1
    conv._conv_forward = lambda *args, **options: type(conv)._conv_forward(conv, *args, **options)
    return "decoder.conv1 is a CausalConv3d of another kind"


@pytest.mark.parametrize("change", [_replace_decode, _wrap_rows, _convolve_otherwise])
@torch.inference_mode()
def test_what_other_nodes_change_is_theirs(said: Any, change: Callable[[Any], str]) -> None:
    """Before the node and behind it."""
    vae = wan_vae()
    latent = torch.randn(1, 16, 1, 3, 3)
    before = lean(vae)
    reason = change(vae.first_stage_model)
    wanted = vae.decode(latent)
    assert lean(vae) is vae
    assert f"this VAE is left unchanged: {reason}" in said()
    assert torch.equal(before.decode(latent), wanted)
    assert f"ComfyUI's own code runs: {reason}" in said()


class _Wrapped(torch.nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


@torch.inference_mode()
def test_a_layer_that_is_wrapped_behind_the_node_runs(said: Any) -> None:
    vae = wan_vae()
    latent, changed = torch.randn(1, 16, 1, 3, 3), lean(vae)
    wanted = vae.decode(latent)
    blocks = vae.first_stage_model.decoder.middle
    blocks[0] = _Wrapped(blocks[0])
    assert torch.equal(changed.decode(latent), wanted)
    assert "ComfyUI's own code runs: decoder.middle.0 is a _Wrapped of another kind" in said()


def test_a_latent_that_wants_a_gradient(said: Any) -> None:
    vae = wan_vae()
    model = lean(vae).first_stage_model.requires_grad_(False)
    latent = torch.randn(1, 16, 1, 2, 2, requires_grad=True)
    model.decode(latent).sum().backward()
    assert latent.grad is not None
    assert "ComfyUI's own code runs: gradients are on" in said()


@torch.inference_mode()
def test_the_need_of_a_long_video_is_not_cut_to_the_hosts() -> None:
    """The host's own does not count the frames."""
    vae = wan_vae(96)
    shape = (1, 16, 251, 60, 104)
    made = lean(vae)
    call = made.first_stage_model.decode.call(torch.Size(shape), torch.bfloat16, vae.device)
    told = made.memory_used_decode(shape, torch.bfloat16)
    assert told > vae.memory_used_decode(shape, torch.bfloat16)
    assert told >= made.first_stage_model.decode._choice.need(call)


@torch.inference_mode()
def test_a_call_that_makes_nothing_is_the_hosts(said: Any) -> None:
    vae = wan_vae()
    for shape in ((1, 3, 1, 0, 16), (1, 3, 1, 4, 4)):
        stock = vae.memory_used_encode(shape, torch.float32)
        assert lean(vae).memory_used_encode(shape, torch.float32) == stock


@torch.inference_mode()
def test_attention_borrows_its_weights_once() -> None:
    """A bug: once for each frame, of a layer whose weights are patched or streamed."""
    vae = wan_vae()
    vae.decode(torch.randn(1, 16, 1, 2, 2))
    seen: list[int] = []

    def count(weight: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return weight

    block = vae.first_stage_model.decoder.middle[1]
    for part in (block.to_qkv, block.proj):
        part.weight_function = [count]
    lean(vae).decode(torch.randn(1, 16, 5, 2, 2))
    assert len(seen) == 2
