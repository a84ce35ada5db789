"""What the plan says that weights take of a card, against pages and buffers of comfy-aimdo."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pack.nodes.units import GIB, PAGE_BYTES
from pack.testing.fake_card import FakeCard, on_fake_card

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.once]


@pytest.mark.parametrize("gib", [2.0, 6.0, 11.8])
@on_fake_card
def test_weights_take_what_the_plan_says(host: Any, gib: float) -> None:
    """Bug: pages and buffers were planned to the byte; the library takes 32 and 16 MiB at a time.

    The blocks' matrices in bfloat16, as the host asks for them: what gets no page goes through one
    of two buffers, in turn.
    """
    from comfy_aimdo.model_vbar import ModelVBAR, vbar_fault, vbar_unpin
    from comfy_aimdo.vram_buffer import VRAMBuffer
    from pack.nodes.denoiser.plan import DEFAULT
    from pack.nodes.denoiser.sizes import Z_IMAGE, Request
    from pack.nodes.fit.stages import denoise_stages, published_models

    dim, hidden = Z_IMAGE.dim, Z_IMAGE.ffn_dim
    block = [2 * dim * out for out in (Z_IMAGE.qkv_dim, dim, hidden, hidden, hidden)]
    models = replace(published_models(), denoiser_weight_bytes=34 * sum(block))
    stage, budget = denoise_stages(models, Request(1024, 1024))[DEFAULT], int(gib * GIB)
    card = FakeCard(16 * GIB)
    pages = ModelVBAR(2 * models.denoiser_weight_bytes, 0)
    weights = [pages.alloc(size) for size in block * 34]
    pages.set_watermark(stage.resident_bytes(budget))
    buffers, streamed = [VRAMBuffer(GIB, 0), VRAMBuffer(GIB, 0)], 0
    for weight in weights * 2:
        if vbar_fault(weight) is not None:
            vbar_unpin(weight)
        else:
            buffers[streamed % 2].get(weight[2])
            streamed += 1
    planned = stage.weights_on_card_bytes(budget) - stage.held_bytes(budget)
    assert (streamed > 0) == (stage.streamed_bytes(budget) > 0)
    # A weight that crosses the limit has no page.
    assert planned - max(block) - PAGE_BYTES < card.used_bytes <= planned


@pytest.mark.parametrize("pinned_bytes", [-1, 20 * GIB])
def test_the_report_names_what_is_outside_of_the_budget(
    host: Any, monkeypatch: pytest.MonkeyPatch, pinned_bytes: int
) -> None:
    """On a card of 16 GiB of which 9 are free, with 5 reserved by torch."""
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher
    from pack.nodes.host.base import device
    from pack.nodes.host.fit import budget

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GIB, 16 * GIB))
    monkeypatch.setattr(device, "allocator_bytes", lambda device, kind: (5 * GIB, 6 * GIB))
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", pinned_bytes)
    patcher = ModelPatcher(torch.nn.Linear(8, 8), torch.device("cuda", 0), torch.device("cpu"))
    text = "\n".join(budget.notes(patcher))
    assert "CUDA context and other programs: 2.00 GiB, on top of the budget." in text
    assert ("Pinned RAM" in text) == (pinned_bytes > 0)
    assert ("at most 20.00 GiB" in text) == (pinned_bytes > 0)
