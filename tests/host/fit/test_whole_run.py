"""Whole runs at full width on a fake card: no stage exceeds the budget, nor does a second run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.denoiser.sizes import Request
from pack.nodes.units import GIB, MIB
from pack.testing.dynamic_host import DynamicHost
from pack.testing.fake_card import on_fake_card

pytestmark = [
    pytest.mark.usefixtures("host"),
    pytest.mark.once,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch with CUDA"),
]


@pytest.mark.parametrize(("gib", "side"), [(1, 1024), (1.5, 2048), (2, 1024)])
@on_fake_card
def test_a_run_stays_within_its_budget(
    host: Any, monkeypatch: pytest.MonkeyPatch, gib: float, side: int
) -> None:
    """On a card of 24 GiB, so that nothing but the budget keeps the bytes down.

    Bug: pages of the embedding table stayed that an encode without a budget had filled.
    """
    from pack.nodes.fit_to_vram import FitToVRAM

    there = DynamicHost(24 * GIB, monkeypatch)
    with there.mode, torch.inference_mode():
        made = FitToVRAM.execute(
            there.model, gib, "balance", side, side, 1, vae=there.vae, clip=there.clip
        ).args
    model, vae, report, clip = made
    request = Request(side, side)
    assert there.encode(there.clip, "all of the text encoder").weights > 7 * GIB
    for words in ("a red fox in the snow", "a lighthouse at dusk"):
        stages = {
            "text encode": there.encode(clip, words),
            "denoise": there.sample(model, request),
            "VAE decode": there.decode(vae, request),
        }
        for name, held in stages.items():
            assert held.live > 20 * MIB and held.weights > 100 * MIB, name
            assert held.together <= gib * GIB, name
    assert there.order.faults == [], "each weight is whole when it is read"
    assert "fits" in report
