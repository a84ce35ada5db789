"""The formulas of the peaks, by hand; the figures measured on the host are in tests/host."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.peak import Copies, lean_peak_bytes, stock_peak_bytes
from pack.nodes.denoiser.sizes import Request, TransformerSizes

MIB = 2**20
LUMINA_2 = TransformerSizes(
    dim=2304, heads=24, kv_heads=8, head_dim=96, ffn_dim=9216, layers=26, cap_dim=2304,
    pad_multiple=1,
)  # fmt: skip


ENDS_MIB = 0.5 + 1.25  # latent and text


def _cut(groups: int, chunk: int, **options: Any) -> DenoiserPlan:
    return DenoiserPlan(groups, chunk, chunk, **{"holds_rope": False, **options})


# By hand: 4352 tokens in chunks of 512 (the last one too: 4352 = 8 * 512 + 256). U = 31.875 MiB,
# 512 rows of it 3.75 MiB, 0.13 MiB of rope indices.
@pytest.mark.parametrize("holds_query", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 5, 30])
def test_lean_peak_by_hand(groups: int, holds_query: bool) -> None:
    peak = lean_peak_bytes(Request(1024, 1024), _cut(groups, 512, holds_query=holds_query))
    wanted_mib = 31.875 * (2 + (1 + holds_query) / groups) + 2 * 3.75
    assert peak / MIB == pytest.approx(wanted_mib + ENDS_MIB + 32 * 4352 / MIB)


def test_a_rope_table_that_is_held_counts() -> None:
    request, plan = Request(1024, 1024), _cut(2, 512)
    held = lean_peak_bytes(request, dataclasses.replace(plan, holds_rope=True))
    assert held - lean_peak_bytes(request, plan) == 4352 * (64 * 4 * 4 - 32)


@pytest.mark.parametrize(("blocks", "hidden"), [(1, 20480), (4, 12800)])
def test_lean_peak_of_short_sequences_stands_in_the_feed_forward(blocks: int, hidden: int) -> None:
    """512x512 in one chunk: 1280 rows of 3840 + 1.25 or 2 x 10240."""
    peak = lean_peak_bytes(Request(512, 512), _cut(5, 4096, hidden_blocks=blocks))
    held = 1280 * 3840 + 1280 * (3840 + hidden)
    assert peak == held * 2 + (16 * 64 * 64 + 256 * 2560) * 2 + 32 * 1280


def test_lean_peak_with_shared_keys() -> None:
    """24 query heads on 8, two groups of 4: 12 heads held; k, v, then each copied three times."""
    request = Request(1024, 1024, sizes=LUMINA_2)
    fixed = (16 * 128 * 128 + 256 * 2304) * 2 + 32 * 4352
    attending = 4352 * (2304 + (12 + 2 * 12) * 96) + 2 * 1024 * 2304
    assert lean_peak_bytes(request, _cut(2, 1024, hidden_blocks=4)) == attending * 2 + fixed
    copying = 4352 * (2304 + (12 + 2 * 4 + 2 * 12) * 96)
    assert lean_peak_bytes(request, _cut(2, 128)) == copying * 2 + fixed


def test_quantised_layers_hold_q_k_and_v_of_all_heads() -> None:
    """And a chunk of all three beside the rows; their copies take a byte per element."""
    request = Request(1024, 1024, sizes=TransformerSizes(is_whole=True))
    peak = lean_peak_bytes(request, _cut(30, 512))
    assert peak / MIB == pytest.approx(31.875 * 4 + 4 * 3.75 + ENDS_MIB + 32 * 4352 / MIB)
    more = lean_peak_bytes(request, _cut(30, 512), has_copies=True) - peak
    assert more / MIB == (84.375 + 28.125) / 2 - 2 * 3.75
    whole = lean_peak_bytes(request, _cut(30, 4352))  # two whole hidden tensors
    assert whole / MIB == pytest.approx(31.875 * 2 + 2 * 85 + ENDS_MIB + 32 * 4352 / MIB)
    # A LoRA on weights in RAM: their copies are in bfloat16.
    changed = TransformerSizes(is_whole=True, is_dequantised=True)
    assert Copies.of(dataclasses.replace(request, sizes=changed)).qkv == 3840 * 11520
    assert Copies.of(request).qkv == 3840 * 11520 // 2
    # The feed-forward holds the whole second factor, and three copies from the second chunk on.
    small = Request(512, 512, sizes=TransformerSizes(is_whole=True))
    peak = lean_peak_bytes(small, _cut(2, 640), has_copies=True)
    held = 1280 * 3840 * 2 + 640 * (3840 + 2 * 10240) * 2 + 3 * 3840 * 10240
    assert peak == held + (16 * 64 * 64 + 256 * 2560) * 2 + 32 * 1280


# Of 3840 x 11520, 3840 x 3840 and three of 3840 x 10240 elements: 84.375, 28.125 and 3 x 75 MiB.
def test_copies_of_weights_by_hand() -> None:
    large, small = Request(2048, 2048), Request(512, 512)
    plans = _cut(1, 512), _cut(2, 4096, hidden_blocks=4)
    more = [
        lean_peak_bytes(request, plan, has_copies=True) - lean_peak_bytes(request, plan)
        for request, plan in zip((large, small), plans, strict=True)
    ]
    assert more[0] / MIB == 84.375 + 28.125
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
