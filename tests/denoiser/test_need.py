"""What the host is asked to reserve for a call, by hand."""

from __future__ import annotations

from dataclasses import replace

from pack.nodes.denoiser.need import (
    References,
    casts_weights,
    denoiser_live_bytes,
    denoiser_need_bytes,
    denoiser_reserve_bytes,
    of_latent,
    with_references,
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


def test_the_prompt_with_the_most_reference_tokens_counts() -> None:
    """Bug: the one with the most pictures did, however small."""
    small, large = (1, 16, 20, 14), (1, 16, 128, 128)
    few, many = References([large], [9]), References([small, small, small], [40, 33])
    request = with_references(PICTURE, [few, many])
    assert (request.reference_tokens, request.reference_text_tokens) == (4096, 32)
    request = with_references(PICTURE, [many])  # 70 tokens each; one has no text
    assert (request.reference_tokens, request.reference_text_tokens) == (3 * 96, 64 + 64 + 32)
    assert request.tokens == PICTURE.tokens + 3 * 96 + 160
    assert with_references(PICTURE, [References([])]) == PICTURE


def test_features_count_where_the_model_has_tokens_for_them() -> None:
    references = [References([(1, 16, 128, 128)] * 2, [9, 9, 50], [729])]
    assert with_references(PICTURE, references).reference_feature_tokens == 0
    seeing = replace(PICTURE, sizes=replace(Z_IMAGE, has_features=True))
    request = with_references(seeing, references)  # the second and the drawn one have none
    assert request.reference_feature_tokens == 736 + 32 + 32
    assert request.reference_text_tokens == 32 + 32 + 64
    assert with_references(seeing, [References([])]).tokens == seeing.tokens
