"""What a decode or encode asks of a card: launches, host waits, shapes of convolutions, its peak.

On the host's decoder and encoder at full size, on fake tensors. The norms' kernels are twins (see
testing/norm_parts.py), which count as one launch each, as torch's own do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pack.nodes.vae.plan import Prefer
from pack.testing.launches import Launches
from pack.testing.vae_models import FakeVae

MIB = 2**20


class _Most(NamedTuple):
    """Upper bounds, at most 5 % above what was measured."""

    launches: int
    shapes: int
    mib: int


# The host decodes 1024x1024 with 155 launches, 13 shapes and 1296 MiB. Lean VAE had 3,900, 7,700
# and 16,900 launches there, and 13,600, 15,300 and 62,500 at 2048x2048.
DECODES: dict[tuple[int, Prefer], _Most] = {
    (512, "speed"): _Most(680, 30, 164),
    (512, "balance"): _Most(1225, 30, 94),
    (512, "smallest"): _Most(1695, 45, 46),
    (1024, "speed"): _Most(686, 30, 620),
    (1024, "balance"): _Most(1480, 30, 330),
    (1024, "smallest"): _Most(4350, 45, 104),
    (2048, "speed"): _Most(1000, 30, 2300),
    (2048, "balance"): _Most(2700, 30, 1200),
    (2048, "smallest"): _Most(9500, 45, 336),
}
# In float32, 1024x1024 had 1,222, 2,085 and 5,661 launches where its parts were pooled one by one.
FLOATS: dict[Prefer, _Most] = {
    "speed": _Most(740, 30, 1245),
    "balance": _Most(1440, 30, 690),
    "smallest": _Most(4420, 45, 212),
}
# The host encodes 1024x1024 with 128 launches, 14 shapes and 774 MiB. Lean VAE had 3,000, 6,200
# and 13,100 launches.
ENCODES: dict[Prefer, _Most] = {
    "speed": _Most(635, 30, 390),
    "balance": _Most(1590, 47, 256),
    "smallest": _Most(3460, 55, 165),
}


def _assert_within(fake: FakeVae, side: int, prefer: Prefer, most: _Most) -> None:
    with Launches() as seen:
        tracker, _, _ = fake.measure(side, side, prefer)
    assert seen.counts.launches <= most.launches
    assert seen.counts.host_waits == 0
    assert len(seen.convolutions) <= most.shapes
    assert tracker.peak_bytes <= most.mib * MIB


@pytest.fixture(scope="module")
def decoder(host: Any) -> FakeVae:
    return FakeVae(is_decoder=True)


@pytest.mark.parametrize(
    ("side", "prefer"),
    [pytest.param(*case, marks=pytest.mark.once if case[0] != 1024 else []) for case in DECODES],
)
def test_a_decode(decoder: FakeVae, side: int, prefer: Prefer) -> None:
    _assert_within(decoder, side, prefer, DECODES[side, prefer])


@pytest.mark.parametrize("prefer", FLOATS)
def test_a_decode_in_float32(host: Any, prefer: Prefer) -> None:
    """Its statistics are pooled in float64, by as few operations."""
    fake = FakeVae(is_decoder=True, dtype=torch.float32)
    _assert_within(fake, 1024, prefer, FLOATS[prefer])


@pytest.mark.parametrize("prefer", ENCODES)
def test_an_encode(host: Any, prefer: Prefer) -> None:
    _assert_within(FakeVae(is_decoder=False), 1024, prefer, ENCODES[prefer])
