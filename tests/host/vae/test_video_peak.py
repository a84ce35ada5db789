"""What Lean VAE holds with the Wan class, on the host's own at full size, on fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.prefer import PREFERENCES, Prefer
from pack.nodes.vae.video.choice import VideoChoice
from pack.nodes.vae.video.peak import video_peak_bytes
from pack.nodes.vae.video.sizes import VideoCall, VideoPlan
from pack.testing.video_models import VERSIONS, FakeVideoVae, Version

MIB = 2**20
# Peaks to stay below, in MiB, at 512x512: one picture, where the host decodes with 196.
BOUNDS: dict[Version, dict[str, dict[Prefer, int]]] = {
    "2.1": {
        "decode": {"speed": 75, "balance": 41, "smallest": 24},
        "encode": {"speed": 75, "balance": 46, "smallest": 29},
    },
    "2.2": {
        "decode": {"speed": 82, "balance": 42, "smallest": 37},
        "encode": {"speed": 35, "balance": 20, "smallest": 20},
    },
}


@pytest.fixture(scope="module", params=VERSIONS)
def fake(host: Any, request: pytest.FixtureRequest) -> FakeVideoVae:
    return FakeVideoVae(request.param)


def _assert_predicted(fake: FakeVideoVae, call: VideoCall, plan: VideoPlan) -> int:
    peak = fake.measure(call, plan).peak_bytes
    assert 0.97 < video_peak_bytes(call, plan) / peak < 1.03
    return peak


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_the_peak_of_a_picture(fake: FakeVideoVae, way: str, prefer: Prefer) -> None:
    call = fake.call(512, 512, is_decoder=way == "decode")
    stock = fake.stock(call).peak_bytes
    work = fake.arithmetic.total
    plan = VideoChoice(prefer, 0).plan(call)
    assert plan is not None
    peak = _assert_predicted(fake, call, plan)
    assert peak / MIB < BOUNDS[fake.version][way][prefer] < 0.4 * stock / MIB
    assert 0.99 < fake.arithmetic.total / work < 1.001, "each row is computed once"


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_the_peak_of_a_video(fake: FakeVideoVae, way: str) -> None:
    call = fake.call(240, 208, 13, is_decoder=way == "decode")
    stock = fake.stock(call).peak_bytes
    for rows, share in ((240, 0.95), (40, 0.35)):
        assert _assert_predicted(fake, call, VideoPlan(rows, "speed")) < share * stock


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_odd_sizes_are_predicted(fake: FakeVideoVae, way: str) -> None:
    for height, width, frames, rows in ((616, 712, 1, 100), (280, 256, 1, 16), (200, 96, 5, 72)):
        # Wan 2.2's sides are multiples of 16.
        height, width = (side + side % fake.factor for side in (height, width))
        call = fake.call(height, width, frames, is_decoder=way == "decode")
        _assert_predicted(fake, call, VideoPlan(rows, "speed"))


@pytest.mark.once
@pytest.mark.slow
def test_peaks_without_cudnn(fake: FakeVideoVae) -> None:
    """As on AMD cards without MIOpen: a copy of a window for each tap."""
    with torch.backends.cudnn.flags(enabled=False):
        call = fake.call(256, 192)
        assert call.is_unrolled
        for rows in (256, 32):
            _assert_predicted(fake, call, VideoPlan(rows, "speed"))


@pytest.mark.once
def test_calls_repeat_their_allocations(fake: FakeVideoVae) -> None:
    call, plan = fake.call(128, 96, 5), VideoPlan(40, "speed")
    one, two = (fake.measure(call, plan) for _ in range(2))
    assert one.peak_bytes == two.peak_bytes
    assert one.current_bytes == two.current_bytes == 0
