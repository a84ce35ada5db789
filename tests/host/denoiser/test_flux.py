"""FLUX.1 and FLUX.2 behind Apply Gradient Checkpoint: what no other family has."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from pack.testing.family_calls import Heard, forward, given
from pack.testing.family_models import built, is_quantised
from pack.testing.lean_models import assert_same, lean, sample

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.mark.parametrize("name", ["FLUX.2", "FLUX.1"])
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


class Counting(torch.nn.Linear):
    """A layer of another pack, which counts its calls."""

    def __init__(self, layer: Any) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.calls = layer.weight, layer.bias, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.linear(input, self.weight, self.bias)


@pytest.mark.parametrize(("prefer", "times"), [("balance", 1), ("smallest", 2)])
@pytest.mark.parametrize("name", ["FLUX.2", "FLUX.1"])
def test_layers_of_another_pack_are_called_once_for_a_chunk(
    name: str, prefer: str, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Names the bug: what linear1 gave was thrown away but for some columns, and made again."""
    caplog.set_level(logging.INFO)
    model = built(name)
    denoiser = model.model.diffusion_model
    for path, layer in list(denoiser.named_modules()):
        if is_quantised(f"{path}.weight") and isinstance(layer, torch.nn.Linear):
            parent, _, leaf = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), leaf, Counting(layer))
    options = {"prefer": prefer, "chunk_tokens": 0, "head_groups": 0}
    request = given(name, tokens=48)
    assert_same(model, lean(model, **options), **request)
    assert "compute all their columns" in caplog.text
    block = denoiser.single_blocks[0]
    block.linear1.calls = block.linear2.calls = 0
    sample(lean(model, **options), **request)
    assert block.linear1.calls == times * block.linear2.calls
