"""Apply Gradient Checkpoint with every kind of weights that the host knows."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing import lean_models
from pack.testing.lean_models import assert_same, block_lora, lean, offloaded, sample
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.fixture(scope="module")
def z_image(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).model


def with_lora(host: Any, model: Any, loader: str = "load_lora_for_models") -> Any:
    return getattr(host.sd, loader)(model, None, block_lora(model), 0.7, 0.0)[0]


@pytest.mark.parametrize("loader", ["load_lora_for_models", "load_bypass_lora_for_models"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_lora_before_and_after(host, z_image, loader, is_offloaded):
    if not hasattr(host.sd, loader):
        pytest.skip(f"this host has no {loader}")
    place = offloaded if is_offloaded else lambda model: model
    stock = place(with_lora(host, z_image, loader))
    for patched in (lean(with_lora(host, z_image, loader)), with_lora(host, lean(z_image), loader)):
        assert_same(stock, place(patched))
    plain = sample(z_image).latent
    assert (sample(stock).latent - plain).norm() / plain.norm() > 1e-3
    assert torch.equal(sample(lean(z_image)).latent, plain)  # the LoRA is gone again


def test_offloaded_weights(z_image):
    got = assert_same(offloaded(z_image), offloaded(lean(z_image)))
    assert got.queries == {32, lean_models.CHUNK, 576 - 256, 608 - 256}


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2", "fp8_e4m3fn_fast"])
def test_fp8_weights(host, small_folder, weight_dtype):
    model = lean_models.from_loader(host, small_folder, weight_dtype=weight_dtype).model
    stored = model.model.diffusion_model.layers[0].attention.qkv.weight
    assert stored.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    assert_same(model, lean(model))


@pytest.fixture(scope="module")
def weights(host: Any, small_files: dict[str, Path]) -> dict[str, torch.Tensor]:
    return load_file(small_files["transformer"])


def loaded(host: Any, weights: dict[str, torch.Tensor], **options: Any) -> Any:
    with torch.inference_mode():
        return host.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def test_fp8_layers_that_write_into_their_input(host, weights):
    """The host's fast fp8 layers clamp their input in place: it must never be the stream."""
    import comfy.ops

    large = ("attention_norm1.weight", "ffn_norm1.weight")  # so that something is clamped at 448
    weights = {n: 300 * w if n.endswith(large) else w for n, w in weights.items()}
    options = {"custom_operations": comfy.ops.fp8_ops, "dtype": torch.float8_e4m3fn}
    model = loaded(host, weights, **options)
    assert type(model.model.diffusion_model.layers[0].attention.qkv) is comfy.ops.fp8_ops.Linear
    assert_same(model, lean(model))


@pytest.mark.parametrize(
    "algorithm", ["float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise"]
)
def test_quantised_tensors(host, weights, algorithm, caplog):
    import comfy.quant_ops

    if algorithm not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host has no {algorithm}")
    caplog.set_level(logging.INFO)
    model = loaded(host, lean_models.quantised(weights, algorithm))
    qkv = model.model.diffusion_model.layers[0].attention.qkv
    assert isinstance(qkv.weight, comfy.quant_ops.QuantizedTensor)
    assert_same(model, lean(model))
    plain = sample(loaded(host, weights)).latent
    assert 1e-4 < (sample(model).latent - plain).norm() / plain.norm() < 1


@pytest.mark.parametrize("algorithm", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_quantised_products(host, weights, algorithm, is_offloaded, caplog):
    """As on a card that multiplies such numbers: the CPU dequantises only in the product."""
    caplog.set_level(logging.INFO)
    model = multiplying(host, weights, algorithm)
    place = offloaded if is_offloaded else lambda model: model
    if algorithm == "nvfp4":
        assert not torch.equal(sample(model).latent, sample(lean(model)).latent)
        assert "nvfp4 without input scales" in caplog.text
        scale_rows(model, 0.01)
        caplog.clear()
    ours = lean(model)
    assert "input scales" not in caplog.text
    assert ours.object_patches["diffusion_model.layers.0"].settings.sizes.is_whole
    assert_same(place(model), place(ours))


def scale_rows(model: Any, scale: float) -> None:
    """Gives the quantised layers a scale of the rows, as from the file."""
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "quant_format"):
            layer.input_scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)


def multiplying(host: Any, weights: dict[str, torch.Tensor], algorithm: str) -> Any:
    import comfy.quant_ops

    if algorithm not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host has no {algorithm}")
    logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # it tells each fallback
    model = loaded(host, lean_models.quantised(weights, algorithm))
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "_full_precision_mm"):
            layer._full_precision_mm = False
    return model


@pytest.fixture
def fp8(host: Any, weights: dict[str, torch.Tensor]) -> Any:
    return multiplying(host, weights, "float8_e4m3fn")


def settings_of(model: Any) -> Any:
    return model.object_patches["diffusion_model.layers.0"].settings


def test_fp8_rows_with_a_scale_of_the_file(host, weights):
    model = multiplying(host, weights, "float8_e4m3fn")
    without = sample(model).latent
    scale_rows(model, 0.02)
    assert not torch.equal(assert_same(model, lean(model)).latent, without)


@pytest.mark.parametrize("plain", ["layers.0.", "noise_refiner"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_file_with_some_blocks_plain(host, weights, plain, is_offloaded):
    """Names the bug: the first main block spoke for all, so the plan held two parts of three."""
    mixed = {
        name: tensor
        for name, tensor in lean_models.quantised(weights, "float8_e4m3fn").items()
        if not name.startswith(plain)
    }
    mixed |= {name: tensor for name, tensor in weights.items() if name.startswith(plain)}
    model = loaded(host, mixed)
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "_full_precision_mm"):
            layer._full_precision_mm = False
    place = offloaded if is_offloaded else lambda model: model
    ours = lean(model)
    assert settings_of(ours).sizes.is_whole and settings_of(ours).sizes.is_dequantised
    assert_same(place(model), place(ours))


@pytest.mark.parametrize("loader", ["load_lora_for_models", "load_bypass_lora_for_models"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_quantised_layers_with_a_lora_of_the_host(host, fp8, loader, is_offloaded):
    """By estimate, weights in RAM are dequantised for it; on the card they stay as stored."""
    if not hasattr(host.sd, loader):
        pytest.skip(f"this host has no {loader}")
    place = offloaded if is_offloaded else lambda model: model
    stock = place(with_lora(host, fp8, loader))
    ours = lean(with_lora(host, fp8, loader))
    assert settings_of(ours).sizes.is_dequantised == (loader == "load_lora_for_models")
    assert not settings_of(lean(fp8)).sizes.is_dequantised
    assert_same(stock, place(ours))


def louder_than(function: Any) -> Any:
    return lambda *args, **kwargs: 1.1 * function(*args, **kwargs)


@pytest.mark.parametrize("method", ["forward_comfy_cast_weights", "_forward"])
@pytest.mark.parametrize("is_on_layer", [False, True])
@pytest.mark.parametrize("is_emulated", [False, True])
def test_quantised_layers_of_another_pack(host, weights, method, is_on_layer, is_emulated):
    """Names the bug: a subclass that multiplies in its own way was fetched as the host's."""
    model = multiplying(host, weights, "float8_e4m3fn")
    plain = sample(model).latent
    for block in model.model.diffusion_model.layers:
        layer = block.attention.qkv
        layer._full_precision_mm = is_emulated
        louder = louder_than(getattr(type(layer), method))
        if is_on_layer:
            setattr(layer, method, louder.__get__(layer))
        else:
            layer.__class__ = type("Louder", (type(layer),), {method: louder})
    assert not torch.equal(assert_same(model, lean(model)).latent, plain)


def test_quantised_heads_are_halved_by_attention_slice(host, fp8, caplog):
    """Names the bug: lean blocks said that they had cut them, which they cannot."""
    caplog.set_level(logging.INFO)
    model = lean_models.sliced(lean(fp8), "heads")
    assert torch.equal(sample(model).latent, sample(fp8).latent)
    assert "each with its own q, k and v" not in caplog.text
    assert "of 3 heads at a time" in caplog.text


def test_quantised_layers_with_lora(host, weights):
    """The host dequantises a weight that a function changes; the plan cannot know it before."""
    model = multiplying(host, weights, "float8_e4m3fn")
    for layer in model.model.diffusion_model.layers[0].modules():
        if hasattr(layer, "quant_format"):
            layer.weight_function = [lambda weight: weight * 1.5]
    assert_same(model, lean(model))


def test_quantised_layers_that_smooth_their_rows(host, weights):
    import comfy.quant_ops

    if "pre_quant_scale" not in comfy.quant_ops.QUANT_ALGOS["nvfp4"]["parameters"]:
        pytest.skip("this host smooths no rows")
    model = loaded(host, lean_models.quantised(weights, "nvfp4"))
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "quant_format"):
            layer.pre_quant_scale = torch.nn.Parameter(torch.rand(layer.in_features) + 0.5)
    got = assert_same(model, lean(model))
    plain = sample(loaded(host, lean_models.quantised(weights, "nvfp4"))).latent
    assert not torch.equal(got.latent, plain)
