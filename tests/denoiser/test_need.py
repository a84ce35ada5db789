"""What the host is asked to reserve for a call, by hand."""

from __future__ import annotations

from dataclasses import replace

from pack.nodes.denoiser.need import (
    casts_weights,
    denoiser_live_bytes,
    denoiser_need_bytes,
    denoiser_reserve_bytes,
    of_latent,
)
from pack.nodes.denoiser.peak import lean_peak_bytes
from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
from pack.nodes.denoiser.sizes import Z_IMAGE, Request, TransformerSizes

MIB = 2**20
PICTURE = Request(1024, 1024, text_tokens=256)


def test_live_bytes_of_a_plain_request_are_the_peak() -> None:
    plan = denoiser_plan(PICTURE)
    live = denoiser_live_bytes(PICTURE, plan, is_plain=True)
    assert live.peak(has_copies=False) == lean_peak_bytes(PICTURE, plan)
    assert live.peak(has_copies=True) == lean_peak_bytes(PICTURE, plan, has_copies=True)


def test_other_requests_hold_three_streams_and_two_rope_tables_more() -> None:
    plan = denoiser_plan(PICTURE)
    plain, other = (denoiser_live_bytes(PICTURE, plan, is_plain=p).plain for p in (True, False))
    assert other - plain == 3 * 31.875 * MIB + 2 * 4352 * 64 * 4 * 4


def test_seven_tenths_are_reserved_on_top() -> None:
    """The factor is the highest that was simulated; a card's measurement would replace it."""
    assert denoiser_need_bytes(1000 * MIB) == 1700 * MIB


def test_copies_of_weights_are_reserved_as_they_are() -> None:
    """Names the bug: they were left out, 128 MiB where 256 were held."""
    small = Request(512, 512, text_tokens=512)
    plan = denoiser_plan(small, DenoiserChoice(groups=2))
    live, copied = denoiser_live_bytes(small, plan, is_plain=False)
    reserve = denoiser_reserve_bytes(small, plan)
    assert reserve == int(1.7 * live) + copied - live
    assert lean_peak_bytes(small, plan, has_copies=True) < reserve


def test_which_weights_are_cast() -> None:
    stored = Z_IMAGE.parameters
    assert casts_weights(PICTURE, stored) and not casts_weights(PICTURE, 2 * stored)
    whole = replace(PICTURE, sizes=TransformerSizes(is_whole=True))
    assert not casts_weights(whole, stored)  # they multiply as they are


def test_the_request_of_a_latent() -> None:
    wanted = Request(488, 1024, 3, text_tokens=256)
    assert of_latent(PICTURE, (3, 16, 128, 61)) == wanted
