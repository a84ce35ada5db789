"""Blocks are prefetched by the host's own queue: each once, before it is computed, none left over.

The queue is the host's. Only its copies do nothing, as there is no card: what is seen is which
weights are asked for and when, not that copies and arithmetic overlap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pack.testing import lean_models

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.once]


class Prefetched(NamedTuple):
    model: Any
    denoiser: Any
    events: list[Any]

    def forward(self, **asked: Any) -> None:
        from pack.nodes.denoiser.plan import DenoiserChoice
        from pack.nodes.host.base.options import OPTIONS_KEY
        from pack.nodes.host.denoiser.block import BlockSettings
        from pack.nodes.host.denoiser.forward import run_forward
        from pack.nodes.host.denoiser.patch import transformer_sizes

        options = {
            "prefetch_dynamic_vbars": True,
            OPTIONS_KEY: {"block_observer": self.events.append, **asked},
        }
        settings = BlockSettings(transformer_sizes(self.model), DenoiserChoice("smallest"))
        text = torch.zeros(1, 7, lean_models.TEXT_WIDTH)
        with torch.inference_mode():
            x = lean_models.latent(16)
            run_forward(self.denoiser, x, torch.ones(1), text, options, settings)

    def left(self) -> list[Any]:
        return [layer for layer in self.denoiser.modules() if hasattr(layer, "_prefetch")]


@pytest.fixture
def prefetched(host: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A denoiser whose blocks' weights have pages of dynamic VRAM, and what happens to them."""
    import comfy.model_management as management
    import comfy.ops

    model = lean_models.built("ZImage", lean_models.Z_IMAGE)
    denoiser = model.model.diffusion_model
    events: list[Any] = []

    def copies(layers: list[Any], *args: Any) -> None:
        events.append(layers)
        for layer in layers:
            layer._prefetch = {"resident": True, "signature": None}

    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", copies)
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    for name, answer in (("is_device_cpu", False), ("device_supports_non_blocking", True)):
        monkeypatch.setattr(management, name, lambda device, answer=answer: answer)
    for stack in (denoiser.context_refiner, denoiser.noise_refiner, denoiser.layers):
        for layer in stack.modules():
            if isinstance(layer, torch.nn.Linear):
                monkeypatch.setattr(layer, "_v", object(), raising=False)
    return Prefetched(model, denoiser, events)


def test_each_block_is_asked_for_once_before_it_is_computed(prefetched: Prefetched) -> None:
    prefetched.forward()
    stacks = ("context_refiner", "noise_refiner", "layers")
    blocks = {
        f"{stack}.{index}": block
        for stack in stacks
        for index, block in enumerate(getattr(prefetched.denoiser, stack))
    }
    assert prefetched.events[1::2] == list(blocks)
    for layers, block in zip(prefetched.events[::2], blocks.values(), strict=True):
        assert layers == [layer for layer in block.modules() if hasattr(layer, "_v")]
        assert len(layers) >= 5
    assert prefetched.left() == []


def test_nothing_is_prefetched_where_the_plan_has_no_room(prefetched: Prefetched) -> None:
    from pack.nodes.host.base.options import PREFETCH

    prefetched.forward(**{PREFETCH: False})
    assert all(isinstance(event, str) for event in prefetched.events)


def test_an_error_leaves_nothing_for_the_next_forward(prefetched: Prefetched) -> None:
    """Else it would compute with what lies in the buffers, which is another block by then."""
    from comfy import model_prefetch

    def fail(module: Any, args: Any) -> None:
        raise InterruptedError

    # A part that our blocks call as a module.
    handle = prefetched.denoiser.layers[1].adaLN_modulation.register_forward_pre_hook(fail)
    with pytest.raises(InterruptedError):
        prefetched.forward()
    handle.remove()
    assert prefetched.left() == [] and model_prefetch.PREFETCH_QUEUES == []
