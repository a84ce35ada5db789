"""The plans of a video VAE, and what follows from its sizes alone."""

from __future__ import annotations

import pytest
from pack.nodes.prefer import PREFERENCES
from pack.nodes.vae.video.choice import VideoChoice
from pack.nodes.vae.video.peak import video_peak_bytes
from pack.nodes.vae.video.plan import video_plan
from pack.nodes.vae.video.sizes import Link, VideoCall, VideoPlan, VideoSizes

MIB = 2**20


def _decoder(dim: int = 96) -> VideoSizes:
    """The decoder of Wan 2.1 and Qwen-Image."""
    given = 4 * dim
    links = [Link("point", 16, 16), Link("conv", 16, given), Link("block", given, given)]
    links += [Link("attention", given, given), Link("block", given, given)]
    for made, ups in ((4, ("time_up", "up")), (4, ("time_up", "up")), (2, ("up",)), (1, ())):
        made *= dim
        links += [Link("block", given, made), *[Link("block", made, made)] * 2]
        links += [Link(kind, made, made // 2 if kind == "up" else made) for kind in ups]
        given = made // 2
    return VideoSizes(True, (*links, Link("conv", dim, 3)), cut=5)


SIZES = _decoder()


def _call(side: int = 512, frames: int = 1) -> VideoCall:
    return VideoCall(SIZES, frames, side, side, 2)


def _peak(call: VideoCall, plan: VideoPlan | None) -> int:
    assert plan is not None
    return video_peak_bytes(call, plan)


def test_sizes_follow_from_the_chain() -> None:
    assert (SIZES.factor, SIZES.frame_factor) == (8, 4)
    assert _call().sides() == (64, 64)


@pytest.mark.parametrize("frames", [1, 9])
def test_each_preference_holds_less(frames: int) -> None:
    call = _call(1024, frames)
    whole = video_peak_bytes(call, VideoPlan(call.height, "speed"))
    plans = [video_plan(call, prefer=prefer) for prefer in PREFERENCES]
    peaks = [_peak(call, plan) for plan in plans]
    assert whole > peaks[0] > peaks[1] > peaks[2]
    assert peaks[0] <= 0.5 * whole
    assert all(plan is not None and plan.rows % 8 == 0 for plan in plans)


def test_a_longer_strip_holds_more() -> None:
    call = _call()
    peaks = [video_peak_bytes(call, VideoPlan(rows, "speed")) for rows in (512, 256, 128, 64)]
    assert peaks == sorted(peaks, reverse=True)


def test_the_plans_after_memory_ran_out_are_smaller_and_end() -> None:
    call = _call(1024)
    plans = [video_plan(call, prefer="speed", attempt=attempt) for attempt in range(6)]
    rows = [plan.rows for plan in plans if plan is not None]
    assert rows == sorted(rows, reverse=True)
    assert plans[5] is None
    assert plans[4] is not None
    assert plans[4].prefer == "smallest"


def test_the_users_rows_are_taken() -> None:
    plan = video_plan(_call(), prefer="balance", strip_rows=24)
    assert plan == VideoPlan(24, "balance")


def test_the_need_exceeds_the_peak() -> None:
    call, choice = _call(), VideoChoice("balance", 0)
    assert choice.need(call) > _peak(call, choice.plan(call))
    assert "MiB predicted at 512x512" in choice.report(call)
    assert "MiB predicted at 1024x1024" in choice.report(call)


def test_errors_say_what_must_hold() -> None:
    with pytest.raises(ValueError, match="prefer must be one of"):
        video_plan(_call(), prefer="fast")  # type: ignore
    with pytest.raises(ValueError, match="strip_rows must be >= 0, got -1"):
        video_plan(_call(), prefer="speed", strip_rows=-1)
