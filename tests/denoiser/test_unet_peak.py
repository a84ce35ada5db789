"""Requests of U-Nets. Their peaks are measured in tests/host/denoiser."""

from __future__ import annotations

import pytest
from pack.nodes.denoiser.plan import DenoiserChoice
from pack.nodes.denoiser.unet_peak import (
    UNETS,
    UNetRequest,
    predicted_unet_savings,
    unet_peak_bytes,
    unet_stock_bytes,
)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("side", [512, 1000, 2048])
def test_less_memory_with_each_preference(name: str, side: int) -> None:
    request = UNetRequest(UNETS[name], side, side)
    peaks = [unet_stock_bytes(request)]
    for prefer in ("speed", "balance", "smallest"):
        peaks.append(unet_peak_bytes(request, DenoiserChoice(prefer)))
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] > 2 * request.stream_bytes


def test_the_largest_stream() -> None:
    """SDXL's first level has no transformer blocks."""
    assert UNetRequest(UNETS["sdxl"], 1024, 1024).stream_bytes == 2 * 64 * 64 * 640 * 2
    assert UNetRequest(UNETS["sd15"], 512, 512).stream_bytes == 2 * 64 * 64 * 320 * 2


def test_what_the_node_shows() -> None:
    """Of two prompts in one batch, at the sizes that the model was trained on and at twice that."""
    text = predicted_unet_savings(UNETS["sd15"], DenoiserChoice(), dtype_bytes=2)
    request = UNetRequest(UNETS["sd15"], 1024, 1024, batch=2)
    peaks = (unet_stock_bytes(request), unet_peak_bytes(request))
    before, after = (round(peak / 2**20) for peak in peaks)
    assert text.startswith("activations ") and " at 512x512 · " in text
    assert text.endswith(f"{before} -> {after} MiB predicted at 1024x1024, both prompts together")


def test_errors() -> None:
    for given, message in (
        ({"width_px": 16}, "width_px must be >= 32, got 16"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"text_tokens": 0}, "text_tokens must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetRequest(UNETS["sdxl"], **{"width_px": 512, "height_px": 512, **given})
