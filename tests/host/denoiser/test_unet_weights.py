"""U-Nets behind Apply Gradient Checkpoint, with the kinds of weights of files."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pack.testing import attention_models, lean_models
from pack.testing.attention_models import sample
from pack.testing.unet_models import Heard, built, forward, is_quantised, lean, made_of, weights

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
FORMATS = ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"]
NAME = "SDXL"  # whose layers SD1.5 has too
BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def file(host: Any) -> dict[str, torch.Tensor]:
    return weights(NAME)


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("algorithm", FORMATS)
@torch.inference_mode()
def test_quantised_layers(file: dict[str, torch.Tensor], algorithm: str, multiplies: bool) -> None:
    """Args: multiplies: as on a card that multiplies such numbers."""
    import comfy.quant_ops

    if algorithm not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host has no {algorithm}")
    logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # it tells each fallback
    model = made_of(NAME, lean_models.quantised(file, algorithm, is_chosen=is_quantised))
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "_full_precision_mm"):
            layer._full_precision_mm = not multiplies
            if algorithm == "nvfp4" and hasattr(layer, "quant_format"):
                layer.input_scale = torch.nn.Parameter(torch.tensor(0.01), requires_grad=False)
    heard = Heard(model)
    part = heard.model.object_patches[BLOCK]
    assert part.settings.sizes.is_whole == (multiplies or algorithm == "int8_tensorwise")
    wanted = forward(model, NAME)
    assert torch.equal(forward(heard.model, NAME), wanted) and heard.reasons == []
    plain = forward(made_of(NAME, file), NAME)
    assert 1e-4 < (wanted - plain).norm() / plain.norm() < 1.5


@pytest.mark.parametrize("weight_dtype", ["float8_e4m3fn", "fast"])
@torch.inference_mode()
def test_fp8_weights_of_a_plain_file(file: dict[str, torch.Tensor], weight_dtype: str) -> None:
    import comfy.ops

    options: dict[str, Any] = {"dtype": torch.float8_e4m3fn}
    if weight_dtype == "fast":
        options["custom_operations"] = comfy.ops.fp8_ops
    heard = Heard(made_of(NAME, file, **options))
    wanted = forward(made_of(NAME, file, **options), NAME, dtype=torch.float32)
    assert torch.equal(forward(heard.model, NAME, dtype=torch.float32), wanted)
    assert heard.reasons == []


@pytest.mark.parametrize("name", ["SDXL", "SD1.5"])
@torch.inference_mode()
def test_a_streamed_weight_is_fetched_once(
    host: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where a map or a stream is cut, and for two pictures. The first layer runs twice."""
    model = built(name)
    fetched = lean_models.count_fetches(monkeypatch, model)
    heard = Heard(model)
    forward(heard.model, name, batch=2)
    first = model.model.diffusion_model.input_blocks[0][0]
    assert heard.reasons == [] and fetched.pop(first) == 2 and set(fetched.values()) == {1}
    ours = set(fetched)
    fetched.clear()
    forward(model, name, batch=2)
    assert fetched.pop(first) == 1 and set(fetched) == ours


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("comes_first", [False, True])
def test_a_lora_on_weights_in_ram(host: Any, comes_first: bool, is_dora: bool) -> None:
    """Loaded before our node or after it, in a whole sampling."""
    model = attention_models.stable_diffusion()
    layers = {
        name: layer
        for name, layer in model.model.diffusion_model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "_block" in name
    }
    sides = ((name, layer.in_features, layer.out_features) for name, layer in layers.items())
    lora = lean_models.lora_file(sides)
    for name, layer in layers.items() if is_dora else ():
        lora[f"diffusion_model.{name}.dora_scale"] = layer.weight.norm(dim=1, keepdim=True)

    def changed(model: Any) -> Any:
        return host.sd.load_lora_for_models(model, None, lora, 0.7, 0.0)[0]

    both = lean(changed(model)) if comes_first else changed(lean(model))
    wanted = sample(lean_models.offloaded(changed(model)))
    got = sample(lean_models.offloaded(both))
    assert (got - wanted).norm() / wanted.norm() < 1e-5
    plain = sample(model)
    assert (wanted - plain).norm() / plain.norm() > 1e-3
