"""Other families behind Apply Gradient Checkpoint, with the kinds of weights that files have."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pack.testing import lean_models
from pack.testing.family_calls import (
    Heard,
    forward,
    given,
)
from pack.testing.family_models import (
    FLUX,
    MAIN,
    SMALL,
    block_lora,
    built,
    is_quantised,
    made_of,
    weights,
)
from pack.testing.lean_models import assert_same, lean, sample

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
FORMATS = ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"]
MORE = ("klein", "Chroma")  # whose blocks are those of FLUX.2 and FLUX.1, modulated from outside
EACH = [*MAIN, *(pytest.param(name, marks=pytest.mark.once) for name in MORE)]


@pytest.fixture(scope="module")
def files(host: Any) -> dict[str, dict[str, torch.Tensor]]:
    return {name: weights(name) for name in (*MAIN, *MORE)}


def quantised(name: str, file: dict[str, torch.Tensor], algorithm: str, *, multiplies: bool) -> Any:
    """Args: multiplies: as on a card that multiplies such numbers."""
    import comfy.quant_ops

    if algorithm not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host has no {algorithm}")
    logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # it tells each fallback
    model = made_of(name, lean_models.quantised(file, algorithm, is_chosen=is_quantised))
    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "_full_precision_mm"):
            layer._full_precision_mm = not multiplies
            if algorithm == "nvfp4" and hasattr(layer, "quant_format"):
                layer.input_scale = torch.nn.Parameter(torch.tensor(0.01), requires_grad=False)
    return model


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("algorithm", FORMATS)
@pytest.mark.parametrize("name", EACH)
def test_quantised_layers(files, name, algorithm, multiplies):
    """Names the bug: such layers are no nn.Linear, so the plan took them for plain ones."""
    model = quantised(name, files[name], algorithm, multiplies=multiplies)
    ours = lean(model)
    part = ours.object_patches[f"diffusion_model.{SMALL[name].stacks[-1]}.0"]
    sizes, multiplied = part.settings.sizes, multiplies or algorithm == "int8_tensorwise"
    found = sizes.is_whole, sizes.is_quantised, sizes.is_copied
    assert found == (False, multiplied, not multiplied)
    got = assert_same(model, ours, **given(name))
    plain = sample(made_of(name, files[name]), **given(name)).latent
    assert 1e-4 < (got.latent - plain).norm() / plain.norm() < 1.5


@pytest.mark.parametrize("is_offloaded", [False, True])
@pytest.mark.parametrize("name", EACH)
def test_fp8_with_scales_in_ram_and_beside_a_lora(host, files, name, is_offloaded):
    model = quantised(name, files[name], "float8_e4m3fn", multiplies=True)
    place = lean_models.offloaded if is_offloaded else lambda model: model
    assert_same(place(model), place(lean(model)), **given(name))
    lora = block_lora(name, model)
    for loader in ("load_lora_for_models", "load_bypass_lora_for_models"):
        if not hasattr(host.sd, loader):
            continue
        patched = getattr(host.sd, loader)(model, None, lora, 0.7, 0.0)[0]
        got = assert_same(place(patched), place(lean(patched)), **given(name))
        assert not torch.equal(got.latent, sample(model, **given(name)).latent)


@pytest.mark.parametrize("weight_dtype", ["float8_e4m3fn", "fast"])
@pytest.mark.parametrize("name", EACH)
def test_fp8_weights_of_a_plain_file(files, name, weight_dtype):
    import comfy.ops

    options: dict[str, Any] = {"dtype": torch.float8_e4m3fn}
    if weight_dtype == "fast":
        options["custom_operations"] = comfy.ops.fp8_ops
    model = made_of(name, files[name], **options)
    assert_same(model, lean(model), **given(name))


@pytest.mark.parametrize("name", EACH)
@torch.inference_mode()
def test_a_streamed_weight_is_fetched_once_for_a_block(host, monkeypatch, name):
    """Names the bug: Wan's keys of a picture were fetched for each sample."""
    model = built(name)
    fetched = lean_models.count_fetches(monkeypatch, model)
    heard = Heard(model)
    forward(heard.model, name, batch=2)
    assert heard.reasons == []
    ours = set(fetched)
    norms = {layer for layer in ours if not hasattr(layer, "in_features")}
    assert {fetched[layer] for layer in ours - norms} == {1}
    # FLUX's norms of heads, of 128 numbers each, are fetched for each sample.
    assert {fetched[layer] for layer in norms} <= ({1, 2} if name in FLUX else {1})
    forward(model, name, batch=2)
    assert all(layer.weight is None for layer in set(fetched) - ours)
