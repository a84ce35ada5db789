"""A U-Net under dynamic VRAM at full width, see testing/streamed.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.units import GIB
from pack.testing.fake_card import FakeCard, on_fake_card
from pack.testing.families import FAMILIES, Call, FakeFamily
from pack.testing.streamed import Streamed

pytestmark = [
    pytest.mark.usefixtures("host"),
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch with CUDA"),
]
# Two fifths of SDXL's width, with a transformer block where it has two or ten.
NARROW = {
    "model_channels": 128,
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
CALL = Call(512, 512, 77, batch=2)
CARD = 24 * GIB


@pytest.mark.parametrize("limit", [0, CARD])
@on_fake_card
def test_each_weight_is_fetched_once_and_never_overwritten(host: Any, limit: int) -> None:
    """What has a page is copied once for all. The host keeps small layers on the card."""
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    family = FakeFamily(FAMILIES["SDXL"], weights="streamed", changed=NARROW)
    streamed = Streamed(FakeCard(CARD), family)
    with family.mode:
        model = ApplyGradientCheckpoint.execute(streamed.patcher, prefer="smallest").args[0]
    streamed.load(model, limit)

    layers = [layer for layer in family.model.modules() if hasattr(layer, "_v")]
    weights = sum(p.nbytes for layer in layers for p in layer.parameters(recurse=False))
    for step in range(2):
        accesses = streamed.forward(model, CALL)
        assert streamed.order.faults == []
        copies = {(a.fetch, a.begin): a.end - a.begin for a in accesses if a.is_write}
        if step and limit:
            assert copies == {}
        else:
            assert len({fetch for fetch, _ in copies}) == len(layers)
            assert weights <= sum(copies.values()) < 1.001 * weights
