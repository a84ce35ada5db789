"""What Lean VAE holds, on the host's decoder and encoder at full size, on fake tensors."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pack.nodes.vae.peak import lean_vae_peak_bytes, lean_vae_work, stock_vae_peak_bytes
from pack.nodes.vae.plan import PREFERENCES
from pack.testing.vae_models import FakeVae

MIB = 2**20
# Peaks to stay below, in MiB; stock decodes with 1296 at 1024x1024 and 324 at 512x512.
BOUNDS = {
    (512, "speed"): 210,
    (512, "balance"): 125,
    (512, "smallest"): 90,
    (1024, "balance"): 330,
    (1024, "smallest"): 125,
    (1024, "speed"): 640,
    (2048, "balance"): 1200,
    (2048, "smallest"): 400,
}
# Many small operations are slow on fake tensors.
QUICK = {(512, "smallest"), (1024, "balance")}
CASES = [
    pytest.param(*case, bound, marks=() if case in QUICK else pytest.mark.slow)
    for case, bound in BOUNDS.items()
]


@pytest.fixture(scope="module")
def decoder(host: Any) -> FakeVae:
    return FakeVae(is_decoder=True)


@pytest.fixture(scope="module")
def encoder(host: Any) -> FakeVae:
    return FakeVae(is_decoder=False)


def _assert_predicted(fake: FakeVae, height: int, width: int, measured: Any) -> None:
    from pack.nodes.host.vae import layers as vae_layers

    tracker, work, plan = measured
    sizes = vae_layers.sizes(fake.model)
    predicted = lean_vae_peak_bytes(sizes, height, width, 2, plan)
    assert 0.97 < predicted / tracker.peak_bytes < 1.03
    assert work == lean_vae_work(sizes, height, width, plan)


@pytest.mark.parametrize(("side", "prefer", "bound"), CASES)
def test_decode_peaks(decoder: FakeVae, side: int, prefer: str, bound: int) -> None:
    measured = decoder.measure(side, side, prefer)
    assert measured[0].peak_bytes / MIB <= bound
    _assert_predicted(decoder, side, side, measured)


def test_stock_peaks(decoder: FakeVae, encoder: FakeVae) -> None:
    from pack.nodes.host.vae import layers as vae_layers

    for fake in (decoder, encoder):
        sizes = vae_layers.sizes(fake.model)
        predicted = stock_vae_peak_bytes(sizes, 768, 640, 2)
        measured = fake.stock(768, 640).peak_bytes
        assert 0.97 < predicted / measured < 1.01


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_encode_peaks(encoder: FakeVae, prefer: str) -> None:
    stock = encoder.stock(640, 640).peak_bytes
    measured = encoder.measure(640, 640, prefer)
    share = {"speed": 0.594, "balance": 0.332, "smallest": 0.23}[prefer]  # those of a decode
    assert measured[0].peak_bytes < share * stock
    _assert_predicted(encoder, 640, 640, measured)


def test_a_batch_holds_one_sample_and_its_results(decoder: FakeVae) -> None:
    one, three = (
        decoder.measure(256, 256, batch=batch, strip_rows=128)[0].peak_bytes for batch in (1, 3)
    )
    ends = 2 * (3 * 256 * 256 + 16 * 32 * 32)
    assert three - one == 2 * ends


def test_odd_sizes_are_predicted(decoder: FakeVae) -> None:
    draw = random.Random(0)
    for prefer in ("speed", "balance"):
        height, width = (8 * draw.randrange(60, 80) for _ in range(2))
        rows = draw.choice([0, 32])
        measured = decoder.measure(height, width, prefer, strip_rows=rows)
        _assert_predicted(decoder, height, width, measured)


def test_calls_repeat_their_allocations(decoder: FakeVae) -> None:
    one, two = (decoder.measure(256, 200, "balance") for _ in range(2))
    assert one[0].peak_bytes == two[0].peak_bytes
    assert one[0].current_bytes == two[0].current_bytes == 0
