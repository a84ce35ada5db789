"""What the host is asked to reserve for a call, by hand."""

from __future__ import annotations

from pack.nodes.denoiser.need import denoiser_live_bytes, denoiser_need_bytes, of_latent
from pack.nodes.denoiser.peak import lean_peak_bytes
from pack.nodes.denoiser.plan import denoiser_plan
from pack.nodes.denoiser.sizes import Request

MIB = 2**20
PICTURE = Request(1024, 1024, text_tokens=256)


def test_live_bytes_of_a_plain_request_are_the_peak() -> None:
    plan = denoiser_plan(PICTURE, groups=2)
    assert denoiser_live_bytes(PICTURE, 2, is_plain=True) == lean_peak_bytes(PICTURE, plan)


def test_other_requests_hold_three_streams_and_two_rope_tables_more() -> None:
    plain, other = (denoiser_live_bytes(PICTURE, 2, is_plain=p) for p in (True, False))
    assert other - plain == 3 * 31.875 * MIB + 2 * 4352 * 64 * 4 * 4


def test_seven_tenths_are_reserved_on_top() -> None:
    """The factor is the highest that was simulated; a card's measurement would replace it."""
    assert denoiser_need_bytes(1000 * MIB) == 1700 * MIB


def test_the_request_of_a_latent() -> None:
    wanted = Request(488, 1024, 3, text_tokens=256)
    assert of_latent(PICTURE, (3, 16, 128, 61)) == wanted
