"""What a decode or encode asks of a card: launches, host waits, shapes of convolutions, its peak.

On the host's decoder and encoder at full size, on fake tensors. The norms' kernels are twins (see
testing/norm_parts.py), which count as one launch each, as torch's own do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from pack.nodes.vae.plan import Prefer
from pack.testing.launches import Launches
from pack.testing.vae_models import FakeVae

MIB = 2**20


class _Most(NamedTuple):
    """Upper bounds."""

    launches: int
    shapes: int
    mib: int


# The host decodes 1024x1024 with 155 launches, 13 shapes and 1296 MiB. Lean VAE had 3,900, 7,700
# and 16,900 launches there, and 13,600, 15,300 and 62,500 at 2048x2048.
DECODES: dict[tuple[int, Prefer], _Most] = {
    (512, "speed"): _Most(700, 30, 210),
    (512, "balance"): _Most(1500, 30, 125),
    (512, "smallest"): _Most(2000, 45, 90),
    (1024, "speed"): _Most(700, 30, 620),
    (1024, "balance"): _Most(1500, 30, 330),
    (1024, "smallest"): _Most(5000, 45, 125),
    (2048, "speed"): _Most(1000, 30, 2300),
    (2048, "balance"): _Most(2700, 30, 1200),
    (2048, "smallest"): _Most(9500, 45, 400),
}
# The host encodes 1024x1024 with 128 launches, 14 shapes and 774 MiB. Lean VAE had 3,000, 6,200
# and 13,100 launches.
ENCODES: dict[Prefer, _Most] = {
    "speed": _Most(700, 30, 390),
    "balance": _Most(1750, 45, 250),
    "smallest": _Most(3700, 55, 165),
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


@pytest.mark.parametrize("prefer", ENCODES)
def test_an_encode(host: Any, prefer: Prefer) -> None:
    _assert_within(FakeVae(is_decoder=False), 1024, prefer, ENCODES[prefer])
