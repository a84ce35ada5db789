"""The formulas of the peaks, by hand; the figures measured on the host are in tests/host."""

from __future__ import annotations

import dataclasses

import pytest
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.peak import Copies, lean_peak_bytes, stock_peak_bytes
from pack.nodes.denoiser.plan import denoiser_plan
from pack.nodes.denoiser.sizes import Request, TransformerSizes

MIB = 2**20
LUMINA_2 = TransformerSizes(
    dim=2304, heads=24, kv_heads=8, head_dim=96, ffn_dim=9216, layers=26, cap_dim=2304,
    pad_multiple=1,
)  # fmt: skip


# By hand: 4352 tokens in chunks of 512 (the last one too: 4352 = 8 * 512 + 256), latent 0.5 MiB,
# text 1.25 MiB. U = 31.875 MiB, 512 rows of it 3.75 MiB, 0.1 MiB of rope indices.
@pytest.mark.parametrize(
    ("groups", "wanted_mib"),
    [
        (1, 31.875 * 3 + 3 * 3.75),
        (2, 31.875 * 2.5 + 2 * 3.75),
        (5, 31.875 * 2.2 + 2 * 3.75),
        (30, 31.875 * (2 + 2 / 30) + 2 * 3.75),
    ],
)
def test_lean_peak_by_hand(groups: int, wanted_mib: float) -> None:
    peak = lean_peak_bytes(Request(1024, 1024), DenoiserPlan(groups, 512))
    assert peak / MIB == pytest.approx(wanted_mib + 0.5 + 1.25 + 24 * 4352 / MIB)


def test_lean_peak_of_short_sequences_stands_in_the_feed_forward() -> None:
    """512x512 in one chunk: 1280 rows of 3840 + 1.25 x 10240."""
    peak = lean_peak_bytes(Request(512, 512), DenoiserPlan(5, 4096))
    held = 1280 * 3840 + 1280 * (3840 + 12800)
    assert peak == held * 2 + (16 * 64 * 64 + 256 * 2560) * 2 + 24 * 1280


def test_lean_peak_with_shared_keys() -> None:
    """24 query heads on 8, two groups of 4: 12 heads held; k, v, then each copied three times."""
    request = Request(1024, 1024, sizes=LUMINA_2)
    fixed = (16 * 128 * 128 + 256 * 2304) * 2 + 24 * 4352
    attending = 4352 * (2304 + (12 + 2 * 12) * 96) + 2 * 512 * 2304
    assert lean_peak_bytes(request, DenoiserPlan(2, 512)) == attending * 2 + fixed
    copying = 4352 * (2304 + (12 + 4 + 2 * 12) * 96)
    assert lean_peak_bytes(request, DenoiserPlan(2, 128)) == copying * 2 + fixed


def test_quantised_layers_hold_q_k_and_v_of_all_heads() -> None:
    """And a chunk of all three beside k rotated; their copies take a byte per element."""
    request = Request(1024, 1024, sizes=TransformerSizes(is_whole=True))
    peak = lean_peak_bytes(request, DenoiserPlan(30, 512))
    assert peak / MIB == pytest.approx(31.875 * 4 + 4 * 3.75 + 0.5 + 1.25 + 24 * 4352 / MIB)
    more = lean_peak_bytes(request, DenoiserPlan(30, 512), has_copies=True) - peak
    assert more / MIB == (84.375 + 28.125) / 2 - 2 * 3.75
    # A LoRA on weights in RAM: their copies are in bfloat16.
    changed = TransformerSizes(is_whole=True, is_dequantised=True)
    assert Copies.of(dataclasses.replace(request, sizes=changed)).qkv == 3840 * 11520
    assert Copies.of(request).qkv == 3840 * 11520 // 2
    # The feed-forward holds the whole second factor, and three copies from the second chunk on.
    small = Request(512, 512, sizes=TransformerSizes(is_whole=True))
    peak = lean_peak_bytes(small, DenoiserPlan(2, 640), has_copies=True)
    held = 1280 * 3840 * 2 + 640 * (3840 + 2 * 10240) * 2 + 3 * 3840 * 10240
    assert peak == held + (16 * 64 * 64 + 256 * 2560) * 2 + 24 * 1280


# Of 3840 x 11520, 3840 x 3840 and three of 3840 x 10240 elements: 84.375, 28.125 and 3 x 75 MiB.
def test_copies_of_weights_by_hand() -> None:
    large, small = Request(2048, 2048), Request(512, 512)
    plans = DenoiserPlan(1, 512), DenoiserPlan(2, 4096)
    more = [
        lean_peak_bytes(request, plan, has_copies=True) - lean_peak_bytes(request, plan)
        for request, plan in zip((large, small), plans, strict=True)
    ]
    # The peak moves from the rotation of k (3 chunks of 3.75 MiB) to the last norm (2), where out
    # has been fetched.
    assert more[0] / MIB == 84.375 + 28.125 - 3.75
    # One chunk of 1280 rows: w2 is fetched when w3's column blocks of 2560 are gone.
    assert more[1] / MIB == 3 * 75 - 1280 * 2560 * 2 / MIB
    batch = dataclasses.replace(large, batch=2)
    both = lean_peak_bytes(batch, plans[0], has_copies=True) - lean_peak_bytes(batch, plans[0])
    assert both / MIB == 84.375 + 28.125
    # The host holds w3's copy beside two hidden tensors of 25 MiB, else four of them.
    assert (stock_peak_bytes(small, has_copies=True) - stock_peak_bytes(small)) / MIB == 25.0
    assert stock_peak_bytes(large, has_copies=True) == stock_peak_bytes(large)


@pytest.mark.parametrize(
    ("request_", "mib"),
    [
        (Request(1024, 1024), 485),
        (Request(512, 512, 4), 557),
        (Request(2048, 2048), 1922),
        (Request(1024, 1024, 4), 1913),
        (Request(4096, 4096), 7670),
    ],
    ids=str,
)
def test_stock_peak_is_the_measured_one(request_: Request, mib: int) -> None:
    assert stock_peak_bytes(request_) / MIB == pytest.approx(mib, rel=2e-3)


@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_lean_is_below_stock_and_falls_with_groups(dtype_bytes: int, batch: int) -> None:
    request = Request(1024, 768, batch, 77, dtype_bytes)
    peaks = [
        lean_peak_bytes(request, denoiser_plan(request, groups=groups)) for groups in (1, 2, 5, 30)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] < stock_peak_bytes(request) / 2
    half = dataclasses.replace(request, dtype_bytes=1)
    assert stock_peak_bytes(half) < stock_peak_bytes(request)
