"""Requests of other families: tokens, streams, errors. See tests/host/denoiser for their peaks."""

from __future__ import annotations

from typing import Any

import pytest
from pack.nodes.denoiser import families
from pack.nodes.denoiser.families import FAMILIES, FamilyRequest
from pack.nodes.denoiser.plan import DenoiserChoice


def test_tokens_of_a_picture_with_references_and_of_a_video() -> None:
    picture = FamilyRequest(FAMILIES["flux2"], 1024, 1024, references=3)
    assert picture.tokens == 4 * 64 * 64 + 512
    assert picture.stream_bytes == picture.tokens * 6144 * 2
    video = FamilyRequest(FAMILIES["wan"], 832, 480, frames=81)
    assert video.tokens == 21 * 52 * 30  # the text is attended to
    assert video.latent_frames == 21


@pytest.mark.parametrize("family", FAMILIES)
def test_less_memory_with_each_preference_and_more_with_more_samples(family: str) -> None:
    def peaks(batch: int) -> list[int]:
        request = FamilyRequest(FAMILIES[family], 1024, 1024, batch=batch)
        stock = families.family_stock_bytes(request)
        plans = [request.plan(DenoiserChoice(p)) for p in ("speed", "balance", "smallest")]
        return [stock, *(families.family_peak_bytes(request, plan) for plan in plans)]

    one, four = peaks(1), peaks(4)
    assert one == sorted(one, reverse=True) and four == sorted(four, reverse=True)
    # Samples run one by one, so more of them cost less than as many calls.
    assert all(1 < many / few < 4 for many, few in zip(four[1:], one[1:], strict=True))


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("flux2", {"width_px": 8}, "width_px must be >= 16, got 8"),
        ("flux1", {"batch": 0}, "batch must be >= 1, got 0"),
        ("flux1", {"frames": 5}, "frames must be 1 for FLUX.1 dev, got 5"),
        ("qwen-image", {"frames": 5}, "frames must be 1 for Qwen-Image, got 5"),
        ("wan", {"references": 1}, "references must be 0 for Wan 2.1 14B, got 1"),
        ("wan", {"references": -1}, "references must be >= 0, got -1"),
    ],
)
def test_errors(family: str, options: dict[str, Any], message: str) -> None:
    given = {"width_px": 1024, "height_px": 1024, **options}
    with pytest.raises(ValueError, match=message):
        FamilyRequest(FAMILIES[family], **given)
