"""The test-only shim answers for small widths and changes no other answer of the host."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pack.testing import tiny_models


@pytest.fixture
def shim(widened) -> Iterator:
    """The shim, taken out; the test may put it in."""
    from pack.testing import widen_detection

    widen_detection.uninstall()
    yield widen_detection
    widen_detection.install()


def _transformer(dim: int) -> dict[str, torch.Tensor]:
    """The names and shapes of a single file of that width, without values."""
    qkv = {"qkv": (3 * dim, dim), "k_norm": (128,)}
    block = {f"layers.0.attention.{k}.weight": shape for k, shape in qkv.items()}
    shapes = {
        **block,
        **{name.replace("layers", "noise_refiner"): shape for name, shape in block.items()},
        "cap_embedder.1.weight": (dim, 64),
        "cap_pad_token": (1, dim),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _text_encoder(hidden: int, *, qwen3: bool) -> dict[str, torch.Tensor]:
    names = ["post_attention_layernorm.weight"] + ["self_attn.q_norm.weight"] * qwen3
    return {f"model.layers.0.{name}": torch.empty(hidden, device="meta") for name in names}


def _answers(host, dim: int) -> tuple[type | None, dict]:
    import comfy.model_detection as detection

    state_dict = _transformer(dim)
    config = detection.detect_unet_config(state_dict, "")
    found = detection.model_config_from_unet_config(config, state_dict)
    return type(found), found.unet_config


@pytest.mark.parametrize("dim", [384, 768, 1152, 1536])
def test_small_widths_are_z_image(host, shim, dim):
    published_class, published = _answers(host, 3840)
    assert _answers(host, dim)[0] is not published_class
    shim.install()
    found_class, found = _answers(host, dim)
    heads = dim // 128
    assert found_class is published_class
    assert found == {**published, "dim": dim, "n_heads": heads, "n_kv_heads": heads}


@pytest.mark.parametrize("dim", [512, 2304, 3840, 4224])
def test_other_widths_get_the_hosts_answer(host, shim, dim):
    before = _answers(host, dim)
    shim.install()
    assert _answers(host, dim) == before


def test_text_encoders(host, shim):
    kinds = [(64, True), (64, False), (1024, True), (2560, True), (4096, True), (4096, False)]

    def answers() -> list:
        return [host.sd.detect_te_model(_text_encoder(h, qwen3=q)) for h, q in kinds]

    before = answers()
    shim.install()
    assert before[0] != host.sd.TEModel.QWEN3_4B
    assert answers() == [host.sd.TEModel.QWEN3_4B, *before[1:]]


def test_install_and_uninstall_leave_the_host_as_it_was(host, shim):
    import comfy.ldm.lumina.model
    import comfy.model_detection

    def functions() -> list:
        return [
            comfy.model_detection.detect_unet_config,
            comfy.model_detection.model_config_from_unet_config,
            comfy.ldm.lumina.model.TimestepEmbedder,
            host.sd.detect_te_model,
        ]

    before = functions()
    shim.install()
    shim.install()
    assert not set(functions()) & set(before)
    shim.uninstall()
    assert functions() == before


@pytest.mark.once
@pytest.mark.slow
def test_real_widths_need_no_shim(host, shim, tmp_path):
    """The unmodified host takes a file of the published widths for Z-Image and computes with it."""
    import comfy.utils

    paths = tiny_models.write_real_width_files(tmp_path, te_layers=3)
    model = host.sd.load_diffusion_model_state_dict(
        comfy.utils.load_torch_file(str(paths["transformer"]))
    )
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(*s, generator=generator) for s in ((1, 16, 8, 8), (1, 9, 2560)))
    host.model_management.load_models_gpu([model])
    with torch.inference_mode():
        velocity = x - model.model.apply_model(
            x, torch.ones(1), c_crossattn=text, num_tokens=text.shape[1]
        )
    assert type(model.model.model_config).__name__ == "ZImage"
    assert 0.1 < velocity.std().item() < 10
