"""FLUX.1 and FLUX.2 behind Apply Gradient Checkpoint: what no other family has."""

from __future__ import annotations

import pytest
import torch
from pack.testing.family_calls import (
    Heard,
    forward,
)
from pack.testing.family_models import (
    built,
)

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
