"""What one call of Lean VAE holds beside its maps, and which of torch's switches it sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from pack.testing.card_tracker import CardTracker
from pack.testing.launches import Launches
from pack.testing.vae_models import At, FakeVae, kl_vae, last_conv, lean
from torch.backends import cudnn

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(params=["all", "conv"])
def switch(request: pytest.FixtureRequest) -> Iterator[Any]:
    """What holds a precision that the user set: for all of cuDNN, or for its convolutions."""
    switch: Any = cudnn if request.param == "all" else cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        yield switch
    finally:
        switch.fp32_precision = before


@torch.inference_mode()
def test_the_precision_of_convolutions_stays_as_the_user_set_it(
    switch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's set_flags ended the decode where it was set for one kind, else it reset it."""
    vae, latent = kl_vae(mult=(1, 2)), torch.randn(1, 4, 4, 4)
    wanted = vae.decode(latent)  # loads it: that takes weight functions away
    seen: list[bool] = []
    monkeypatch.setattr(cudnn, "benchmark", True)
    for failures in (set(), {1}):
        watch = At(lambda: seen.append(cudnn.benchmark), {1})
        last_conv(vae).weight_function = [watch, At(_raise, failures)]
        try:
            with pytest.raises(RuntimeError, match="of the test") if failures else nullcontext():
                made = lean(vae).decode(latent)
        finally:
            last_conv(vae).weight_function = []
        assert cudnn.benchmark, "on again, after an error too"
        assert switch.fp32_precision == "ieee"
    assert seen == [False, False]
    assert (made - wanted).norm() < 1e-5 * wanted.norm()


def _raise() -> None:
    raise RuntimeError("of the test")


def test_a_picture_in_ram_waits_on_the_card_in_the_dtype_of_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each is copied once, not strip by strip. The host hands in float32, which lay on the card."""
    from pack.nodes.host.base.server import NodeLog
    from pack.nodes.host.vae import forward as vae_forward
    from pack.nodes.host.vae import layers as vae_layers
    from pack.nodes.vae.choice import VaeChoice

    decoder = FakeVae(is_decoder=True)
    monkeypatch.setattr(vae_layers, "_has_sdpa", lambda device: True)
    monkeypatch.setattr(vae_layers, "_most_queries", lambda keys: keys.shape[2])
    settings = vae_forward.VaeSettings(lambda call, device: VaeChoice("speed", 64))
    forward = vae_forward.LeanForward(decoder.model, settings, NodeLog("Lean VAE", None), None)
    peaks = []
    for dtype in (decoder.dtype, torch.float32):
        with torch.inference_mode(), decoder.mode:
            latent = torch.empty(2, 16, 32, 32, dtype=decoder.dtype, device="cuda")
            pictures = torch.empty(2, 3, 256, 256, dtype=dtype, device="cpu")
            with Launches() as seen, CardTracker() as tracker:
                forward(latent, output_buffer=pictures)
        assert seen.counts.host_waits == 2
        peaks.append(tracker.peak_bytes)
    assert peaks[0] == peaks[1]
