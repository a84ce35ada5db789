"""What other models hold of a named budget, with the host's own patchers and list of models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")
LAYERS, WIDTH = 8, 256
MODEL_BYTES = LAYERS * (WIDTH + 1) * WIDTH * 4


@pytest.fixture
def patchers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three loaded models of the same size, the first loaded last; the CPU stands for a card."""
    import comfy.model_management as management
    import comfy.ops
    from comfy.model_patcher import ModelPatcher
    from pack.nodes.host.base import reserve

    management.unload_all_models()
    cpu, made = torch.device("cpu"), []
    for _ in range(3):
        layers = [comfy.ops.manual_cast.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        made.append(ModelPatcher(torch.nn.Sequential(*layers), cpu, cpu))
        management.load_models_gpu(made[-1:], force_full_load=True)
    made.reverse()
    assert [p.loaded_size() for p in made] == [MODEL_BYTES] * 3
    monkeypatch.setattr(reserve, "is_card", lambda device: True)
    yield made
    management.unload_all_models()


def test_the_least_recently_used_goes_first_and_no_more_than_is_needed(patchers):
    from pack.nodes.host.base.reserve import make_room

    used, recent, oldest = patchers
    make_room([used], MODEL_BYTES, int(2.5 * MODEL_BYTES))
    assert used.loaded_size() == recent.loaded_size() == MODEL_BYTES
    assert 0 < oldest.loaded_size() <= MODEL_BYTES // 2
    make_room([used], MODEL_BYTES, MODEL_BYTES)
    assert (recent.loaded_size(), oldest.loaded_size()) == (0, 0)
    assert used.loaded_size() == MODEL_BYTES


def test_models_that_are_loaded_with_it_stay(patchers):
    """A ControlNet: its bytes are in the plan already."""
    from pack.nodes.host.base.reserve import make_room

    used, other, control = patchers
    make_room([used.clone(), control], MODEL_BYTES, MODEL_BYTES)
    assert (used.loaded_size(), control.loaded_size()) == (MODEL_BYTES, MODEL_BYTES)
    assert other.loaded_size() == 0


def test_without_a_named_budget_or_with_room_all_stay(patchers):
    from pack.nodes.host.base.reserve import make_room

    make_room(patchers[:1], MODEL_BYTES, None)
    make_room(patchers[:1], MODEL_BYTES, 3 * MODEL_BYTES)
    assert [p.loaded_size() for p in patchers] == [MODEL_BYTES] * 3
