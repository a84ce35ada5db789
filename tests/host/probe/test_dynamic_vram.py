"""The probe under dynamic VRAM: the host's own patchers and comfy-aimdo, on the fake card.

Bug: a reading added today's pages to an older peak of the allocator and called the sum exact.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.units import GIB, MIB
from pack.testing.fake_card import FakeCard, forward, on_fake_card

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.once]
DEVICE = torch.device("cuda", 0)


class Stage:
    """Models on the fake card, and the probe's counter of it."""

    def __init__(self, card_bytes: int) -> None:
        import comfy.memory_management as memory
        from pack.nodes.host.probe import device as probe_device
        from pack.nodes.probe.counter import PeakCounter

        self.card = card = FakeCard(card_bytes)
        memory.aimdo_enabled = True  # as main.py does where comfy-aimdo started
        probe_device.allocator_bytes = lambda device: (card.allocated, card.peak)
        read = probe_device.gauge_of(DEVICE).read
        self.counter = PeakCounter(read, card.reset_peak)
        self.probe = self.counter.open(reset=True)
        self.true_peak = 0

    def model(self, gib: float) -> Any:
        """A patcher of a model of so many weights, in the host's list."""
        import comfy.model_management as management
        import comfy.ops
        from comfy.model_patcher import ModelPatcherDynamic

        layers = []
        for _ in range(int(gib * GIB) // (64 * MIB)):
            layers.append(comfy.ops.disable_weight_init.Linear(4096, 16 * 1024, bias=False))
            weight = torch.empty(16 * 1024, 4096, dtype=torch.int8, device="meta")
            # As a file's is loaded; under dynamic VRAM the layer begins without one.
            layers[-1].weight = torch.nn.Parameter(weight, requires_grad=False)
        patcher = ModelPatcherDynamic(torch.nn.Sequential(*layers), DEVICE, torch.device("cpu"))
        management.current_loaded_models.insert(0, management.LoadedModel(patcher))
        return patcher

    def run(self, patcher: Any, gib: float) -> None:
        """A forward: every weight is asked for, beside an activation."""
        with self.card.activation(int(gib * GIB)):
            forward(patcher.model)
            self.true_peak = max(self.true_peak, self.card.used_bytes)

    def seen(self) -> tuple[float, bool]:
        high = self.probe.take(reset=True)
        assert high.bytes <= self.true_peak, "never more than was there"
        return high.bytes / GIB, high.is_exact

    def finish_node(self) -> tuple[float, bool]:
        """As at the end of a node, where the host gives up its copy buffers."""
        import comfy.model_management as management
        from pack.nodes.host.base.device import may_stream

        getattr(management, "STREAM_AIMDO_CAST_BUFFERS", {}).clear()
        high = self.probe.take(reset=True, is_blind=may_stream(DEVICE))
        assert high.bytes <= self.true_peak, "never more than was there"
        return high.bytes / GIB, high.is_exact


def loaded(stage: Stage, gib: float) -> Any:
    patcher = stage.model(gib)
    patcher.load(DEVICE)
    forward(patcher.model)
    stage.probe.take(reset=True)
    return patcher


@on_fake_card
def test_pages_that_stay_are_added_to_the_allocators_peak(host: Any) -> None:
    stage = Stage(24 * GIB)
    patcher = loaded(stage, 6.5)
    stage.run(patcher, 12)
    assert stage.seen() == (18.5, True)


@on_fake_card
def test_pages_that_came_after_the_peak_are_not_added_to_it(host: Any) -> None:
    """24 GiB were shown on a card where 18.5 had been in use."""
    stage = Stage(32 * GIB)
    first = loaded(stage, 6.5)
    stage.run(first, 12)
    second = stage.model(5.5)
    second.load(DEVICE)
    stage.run(second, 0.25)
    assert stage.seen() == (18.5, False), "the second model may have been there before the peak"


@on_fake_card
def test_with_a_reading_between_them_the_sum_is_exact(host: Any) -> None:
    stage = Stage(32 * GIB)
    first = loaded(stage, 6.5)
    stage.run(first, 12)
    assert stage.seen() == (18.5, True)
    second = stage.model(5.5)
    second.load(DEVICE)
    stage.probe.take(reset=True)
    stage.true_peak = 0
    stage.run(second, 1)
    seen, is_exact = stage.seen()
    assert (seen, is_exact) == (12.0, False), "5.5 GiB of pages came while 1 GiB was there"
    stage.run(second, 1)
    assert stage.seen() == (13.0, True)


@on_fake_card
def test_pages_that_were_evicted_for_the_peak_do_not_hide_it(host: Any) -> None:
    """4 GiB were shown where 9 had been in use: the pages were gone when they were read."""
    stage = Stage(int(9.5 * GIB))
    patcher = loaded(stage, 8)
    stage.run(patcher, 1)
    patcher.partially_unload(patcher.offload_device, 8 * GIB)
    with stage.card.activation(4 * GIB):
        pass
    assert patcher.loaded_size() == 0
    assert stage.seen() == (8.0, False), "at least what the reading before had"


@on_fake_card
def test_pages_evicted_and_loaded_again_are_not_added_to_a_peak_between(host: Any) -> None:
    """16 GiB were shown where 12.5 had been in use."""
    stage = Stage(int(12.75 * GIB))
    patcher = loaded(stage, 8)
    stage.run(patcher, 8)  # evicts
    resident = patcher.loaded_size() / GIB
    assert 4 < resident < 5
    patcher.load(DEVICE)
    forward(patcher.model)
    assert patcher.loaded_size() == 8 * GIB
    seen, is_exact = stage.seen()
    assert 8 <= seen <= 12.5
    assert is_exact is False


@pytest.fixture
def has_buffers(host: Any) -> None:
    if not hasattr(host.model_management, "STREAM_AIMDO_CAST_BUFFERS"):
        pytest.skip("this ComfyUI has no copy buffers of dynamic VRAM")


@pytest.mark.usefixtures("has_buffers")
@on_fake_card
def test_copy_buffers_that_came_and_went_may_have_been_there(host: Any) -> None:
    """Bug: the buffer for the text encoder's embedding was gone at the end of its node."""
    import comfy.model_management as management
    from comfy_aimdo.vram_buffer import VRAMBuffer

    stage = Stage(8 * GIB)
    patcher = loaded(stage, 7.25)
    stage.run(patcher, 0.5)
    assert stage.finish_node() == (7.75, True), "nothing was streamed"
    patcher.partially_unload(patcher.offload_device, GIB)
    buffer = management.STREAM_AIMDO_CAST_BUFFERS[None] = VRAMBuffer(GIB, 0)
    buffer.get(784 * MIB)
    resident = patcher.loaded_size()
    stage.probe.take(reset=True)
    del buffer
    stage.run(patcher, 0.5)
    seen = stage.finish_node()
    assert seen == ((resident + 784 * MIB) / GIB, False)


@on_fake_card
def test_a_model_that_is_new_and_evicted_at_its_first_reading_is_not_exact(host: Any) -> None:
    """Bug: 1 GiB was called exact where 9 had been in use."""
    stage = Stage(16 * GIB)
    patcher = stage.model(8)
    patcher.load(DEVICE)
    stage.run(patcher, 1)
    patcher.partially_unload(patcher.offload_device, 8 * GIB)
    assert stage.seen() == (1.0, False)


@on_fake_card
def test_the_first_probe_of_a_prompt_does_not_know_what_was_before(host: Any) -> None:
    """Bug: exact where the text encoder had left the card."""
    stage = Stage(16 * GIB)
    patcher = loaded(stage, 8)
    stage.run(patcher, 1)
    patcher.partially_unload(patcher.offload_device, 8 * GIB)
    high = stage.counter.open_since_reset().take(reset=False)
    assert (high.bytes, high.is_exact) == (GIB, False)


@on_fake_card
def test_pages_that_cannot_be_read_end_no_sampling(host: Any, caplog: Any) -> None:
    stage = Stage(16 * GIB)
    patcher = loaded(stage, 6)
    from comfy_aimdo.model_vbar import ModelVBAR  # loaded again with the card

    def refused(self: Any, *args: Any) -> None:
        raise RuntimeError("Fault failed: 2")

    ModelVBAR.fault, kept = refused, ModelVBAR.fault
    for least in (6.0, 1.0):
        with stage.card.activation(GIB):
            pass
        stage.true_peak = 7 * GIB
        assert stage.seen() == (least, False)
    assert caplog.text.count("cannot be read: Fault failed: 2") == 1
    ModelVBAR.fault = kept
    stage.run(patcher, 1)
    stage.seen()
    stage.run(patcher, 1)
    assert stage.seen() == (7.0, True)


@pytest.mark.usefixtures("has_buffers")
@on_fake_card
def test_copy_buffers_and_comfy_aimdos_own_count_are_in_the_figures(host: Any) -> None:
    import comfy.model_management as management
    from comfy_aimdo.vram_buffer import VRAMBuffer
    from pack.nodes.host.probe import device as probe_device

    stage = Stage(16 * GIB)
    patcher = loaded(stage, 6)
    buffer = management.STREAM_AIMDO_CAST_BUFFERS[None] = VRAMBuffer(GIB, 0)
    buffer.get(100 * MIB)
    stage.true_peak = stage.card.used_bytes
    assert stage.seen() == ((6 * GIB + buffer.size()) / GIB, True)
    with stage.card.activation(GIB):
        figures = {f.name: f.bytes for f in probe_device._aimdo_figures(DEVICE)}
    assert figures == {
        "comfy-aimdo's count, all cards": 7 * GIB + buffer.size(),
        "copy buffers of dynamic VRAM": buffer.size(),
    }
    assert patcher.loaded_size() == 6 * GIB
