"""What the host says of a model's memory, as figures."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")
MIB = 2**20
CARD = torch.device("cuda", 0)


def dynamic_patcher(model: torch.nn.Module) -> Any:
    """The host's own class for dynamic VRAM, on a card that need not be there."""
    from comfy.model_patcher import ModelPatcher, ModelPatcherDynamic

    patcher = ModelPatcherDynamic.__new__(ModelPatcherDynamic, model, CARD)
    # Its own constructor asks a driver for pinned memory.
    ModelPatcher.__init__(patcher, model, CARD, torch.device("cpu"))
    model.dynamic_vbars = {}  # no page has been made
    return patcher


def test_weights_on_the_card_outside_of_pages_are_not_counted_as_not_loaded(host):
    """Bug: a figure took the resident pages alone from the model's size."""
    from pack.nodes.host.probe import device as probe_device

    model = torch.nn.Linear(1024, 2560, bias=False)
    patcher = dynamic_patcher(model)
    model.model_loaded_weight_memory = 3 * MIB
    management = host.model_management
    loaded = management.LoadedModel(patcher)
    management.current_loaded_models.append(loaded)
    try:
        figures = {figure.name: figure.bytes for figure in probe_device.figures(CARD)}
    finally:
        management.current_loaded_models.remove(loaded)
    assert {name: count for name, count in figures.items() if name.startswith("Linear: ")} == {
        "Linear: weights on the device": 3 * MIB,
        "Linear: weights elsewhere": 7 * MIB,
        "Linear: pages resident": 0,
    }
    assert "pages of dynamic VRAM" not in figures


def test_a_deleted_model_whose_place_the_host_keeps_is_passed_over(host):
    from pack.nodes.host.base import device

    management = host.model_management
    patcher = dynamic_patcher(torch.nn.Linear(8, 8))
    loaded = management.LoadedModel(patcher)
    management.current_loaded_models.append(loaded)
    try:
        assert device.models_on(CARD) == [patcher]
        del patcher
        gc.collect()
        assert None in management.loaded_models()
        assert device.models_on(CARD) == []
    finally:
        management.current_loaded_models.remove(loaded)
