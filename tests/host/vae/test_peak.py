"""What Lean VAE holds, on the host's decoder and encoder at full size, on fake tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from pack.nodes.vae.maps import Stored
from pack.nodes.vae.peak import lean_vae_peak_bytes, middle_elements, stock_vae_peak_bytes
from pack.nodes.vae.plan import PREFERENCES, LevelPlan, Prefer, VaePlan
from pack.nodes.vae.steps import Steps
from pack.testing.card_tracker import CardTracker
from pack.testing.vae_models import FakeVae

MIB = 2**20
# Peaks to stay below, in MiB, at 512x512, where stock decodes with 324; others: test_launches.py.
BOUNDS: dict[Prefer, int] = {"speed": 164, "balance": 94, "smallest": 46}
# Measured over predicted, at most; the cases that are measured are below.
OFF = 1.03
# Of the three, test --quick measures the default.
EACH = [
    pytest.param(prefer, marks=[] if prefer == "balance" else [pytest.mark.slow])
    for prefer in PREFERENCES
]
Measured = tuple[Any, int, VaePlan]


@pytest.fixture(scope="module")
def decoder(host: Any) -> FakeVae:
    return FakeVae(is_decoder=True)


@pytest.fixture(scope="module")
def encoder(host: Any) -> FakeVae:
    return FakeVae(is_decoder=False)


@pytest.fixture(scope="module")
def decode_512(decoder: FakeVae) -> Callable[[Prefer], Measured]:
    return cache(lambda prefer: decoder.measure(512, 512, prefer))


@pytest.fixture(scope="module")
def encode_640(encoder: FakeVae) -> Callable[[Prefer], Measured]:
    return cache(lambda prefer: encoder.measure(640, 640, prefer))


def _assert_predicted(fake: FakeVae, height: int, width: int, measured: Measured) -> None:
    tracker, _, plan = measured
    predicted = lean_vae_peak_bytes(fake.call(height, width), plan)
    assert 0.97 < predicted / tracker.peak_bytes < OFF


@pytest.mark.parametrize("prefer", EACH)
def test_decode_peaks(
    decoder: FakeVae, decode_512: Callable[[Prefer], Measured], prefer: Prefer
) -> None:
    measured = decode_512(prefer)
    assert measured[0].peak_bytes / MIB <= BOUNDS[prefer]
    _assert_predicted(decoder, 512, 512, measured)


@pytest.mark.once
@pytest.mark.slow
def test_the_peak_of_a_large_picture_is_predicted(decoder: FakeVae) -> None:
    """Where the stored maps outweigh the strips; long strips, because each operation takes time."""
    measured = decoder.measure(2048, 1536, "smallest", strip_rows=64)
    assert measured[0].peak_bytes / MIB <= 400
    _assert_predicted(decoder, 2048, 1536, measured)


@pytest.mark.once
@pytest.mark.slow
def test_attention_by_scores_is_predicted(decoder: FakeVae) -> None:
    """As on AMD cards: in a large map, the scores have as many bytes as half the keys."""
    from pack.nodes.host.vae import layers as vae_layers

    call = decoder.call(1536, 1536)
    with torch.inference_mode(), decoder.mode:
        x = torch.empty(1, 512, 192, 192, dtype=decoder.dtype, device="cuda")
        attention = replace(
            vae_layers.read(decoder.model, x).middle[1],
            attend=vae_layers._attend_by_scores,
            most_queries=vae_layers._most_by_scores,
        )
        source = Stored(192, 192)
        source.append(x.contiguous(memory_format=torch.channels_last))
        del x
        steps = Steps(LevelPlan(True, True, True, 192), lambda share: None)
        with CardTracker() as tracker:
            tracker.watch(*source.on_device())
            steps.attended(source, steps.pool(source, attention.norm), attention)
    predicted = call.dtype_bytes * middle_elements(call)
    assert 0.97 < predicted / tracker.peak_bytes < OFF


def test_stock_peaks(decoder: FakeVae, encoder: FakeVae) -> None:
    for fake in (decoder, encoder):
        predicted = stock_vae_peak_bytes(fake.call(768, 640))
        measured = fake.stock(768, 640).peak_bytes
        assert 0.97 < predicted / measured < 1.01


@pytest.mark.once
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_peaks_without_cudnn(request: pytest.FixtureRequest, kind: str) -> None:
    """As on AMD cards without MIOpen: nine copies of a strip, which no plan had counted."""
    fake: FakeVae = request.getfixturevalue(kind)
    with torch.backends.cudnn.flags(enabled=False):
        call = fake.call(384, 320)
        assert 0.97 < stock_vae_peak_bytes(call) / fake.stock(384, 320).peak_bytes < 1.01
        tracker, _, plan = fake.measure(384, 320)
    # The copies of a level's widest strip, added to what the level holds at another moment.
    assert 1 < lean_vae_peak_bytes(call, plan) / tracker.peak_bytes < 1.15
    without = lean_vae_peak_bytes(call._replace(is_unrolled=False), plan)
    assert without < 0.8 * tracker.peak_bytes


@pytest.mark.parametrize("prefer", EACH)
def test_encode_peaks(
    encoder: FakeVae, encode_640: Callable[[Prefer], Measured], prefer: Prefer
) -> None:
    stock = encoder.stock(640, 640).peak_bytes
    measured = encode_640(prefer)
    share = {"speed": 0.594, "balance": 0.332, "smallest": 0.23}[prefer]  # those of a decode
    assert measured[0].peak_bytes < share * stock
    _assert_predicted(encoder, 640, 640, measured)


@pytest.mark.once
@pytest.mark.slow
def test_arithmetic_of_a_decode(decoder: FakeVae) -> None:
    """The figures of the node's tooltip. Only the map's edges are convolved by a row too many."""
    stock = decoder.stock_work(1024, 1024)
    speed, balance, smallest = (
        decoder.measure(1024, 1024, prefer)[1] / stock for prefer in PREFERENCES
    )
    assert 1 <= speed < 1.002
    assert 1.2 < balance < 1.25 < smallest < 1.65
    small = decoder.stock_work(256, 256)
    without_ram = decoder.measure(256, 256, "smallest", strip_rows=64, has_ram=False)[1] / small
    assert 2 < without_ram < 2.7
    _, work, plan = decoder.measure(256, 256, "balance", strip_rows=64)
    with torch.inference_mode(), decoder.mode:
        x, out = (
            torch.empty(s, dtype=decoder.dtype, device="cuda")
            for s in ((1, 16, 32, 32), (3, 256, 256))
        )
        fused = decoder.run(x, out, replace(plan, is_fused=True))
    assert 1.05 < fused / small < 1.12
    assert fused < 0.95 * work


@pytest.mark.once
@pytest.mark.slow
def test_arithmetic_of_an_encode(
    encoder: FakeVae, encode_640: Callable[[Prefer], Measured]
) -> None:
    stock = encoder.stock_work(640, 640)
    speed, balance, smallest = (encode_640(prefer)[1] / stock for prefer in PREFERENCES)
    assert 1 < speed < 1.03 < balance < 1.21 < smallest < 1.43


@pytest.mark.once
@pytest.mark.slow
def test_a_batch_holds_one_sample_and_its_results(decoder: FakeVae) -> None:
    one, three = (
        decoder.measure(256, 256, batch=batch, strip_rows=128)[0].peak_bytes for batch in (1, 3)
    )
    ends = 2 * (3 * 256 * 256 + 16 * 32 * 32)
    assert three - one == 2 * ends


@pytest.mark.once
@pytest.mark.slow
def test_odd_sizes_are_predicted(decoder: FakeVae, encoder: FakeVae) -> None:
    draw = random.Random(0)
    for prefer, rows in (("speed", 0), ("balance", 32)):
        height, width = (8 * draw.randrange(60, 80) for _ in range(2))
        measured = decoder.measure(height, width, prefer, strip_rows=rows)
        _assert_predicted(decoder, height, width, measured)
    for height, width, prefer, rows in ((616, 712, "speed", 100), (280, 256, "balance", 16)):
        measured = encoder.measure(height, width, prefer, strip_rows=rows)
        _assert_predicted(encoder, height, width, measured)


@pytest.mark.once
def test_fused_weights_are_predicted(host: Any) -> None:
    """In float32, the sums of taps take more than a small picture: 32 MiB, where 11 were told."""
    fake = FakeVae(is_decoder=True, dtype=torch.float32)
    for height, width, prefer in ((168, 8, "balance"), (32, 72, "speed")):
        _assert_predicted(fake, height, width, fake.measure(height, width, prefer))


@pytest.mark.once
@pytest.mark.slow
def test_calls_repeat_their_allocations(decoder: FakeVae) -> None:
    one, two = (decoder.measure(256, 200, "balance", strip_rows=64) for _ in range(2))
    assert one[0].peak_bytes == two[0].peak_bytes
    assert one[0].current_bytes == two[0].current_bytes == 0
