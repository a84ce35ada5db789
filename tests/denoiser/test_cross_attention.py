"""Cross attention in chunks equals the plain one, and holds what its docstring says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pack.nodes.denoiser import reference
from pack.nodes.denoiser.attention_part import Heads
from pack.nodes.denoiser.cross_attention import add_cross_attention
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v).movedim(1, 2).flatten(2)


@dataclasses.dataclass
class Cross:
    """Seeded weights; the stream's width, that of the text and that of all heads differ."""

    dtype: torch.dtype
    dim: int = 24
    text: int = 20
    heads: Heads = Heads(6, 6, 8)  # noqa: RUF009 (immutable)
    text_tokens: int = 7

    def __post_init__(self) -> None:
        inner = self.heads.query * self.heads.channels
        shapes = {
            "query": (inner, self.dim),
            "key": (inner, self.text),
            "value": (inner, self.text),
            "out": (self.dim, inner),
        }
        self.weights = {
            name: self.draw(*shape, seed=i) * shape[-1] ** -0.5
            for i, (name, shape) in enumerate(shapes.items())
        }
        self.factors = self.draw(self.dim, seed=8)
        self.states = self.draw(self.text_tokens, self.text, seed=9)

    def draw(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def run(self, source: torch.Tensor, chunk: int) -> None:
        def add(change: torch.Tensor, start: int) -> None:
            source[start : start + change.shape[0]].add_(change)

        weights = self.weights
        add_cross_attention(
            source,
            modulated=lambda start, stop: source[start:stop] * self.factors,
            query=lambda rows: rows @ weights["query"].T,
            key=self.states @ weights["key"].T,
            value=self.states @ weights["value"].T,
            attend=attend,
            out=lambda rows: rows @ weights["out"].T,
            add=add,
            heads=self.heads,
            plan=DenoiserPlan(1, 1, chunk),
        )

    def oracle(self, source: torch.Tensor) -> torch.Tensor:
        return reference.cross_attention(
            source,
            text=self.states,
            scale=self.factors,
            channels=self.heads.channels,
            **self.weights,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 6, 13, 39, 1000])
@pytest.mark.parametrize("text_tokens", [1, 7])
def test_equals_the_oracle(dtype: torch.dtype, chunk: int, text_tokens: int) -> None:
    cross = Cross(dtype, text_tokens=text_tokens)
    source = cross.draw(39, cross.dim, seed=10)
    wanted = cross.oracle(source)
    cross.run(source, chunk)
    assert ((source - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]


def test_the_oracle_sees_every_weight() -> None:
    """The comparison above would notice a weight that is not used."""
    cross = Cross(torch.float32)
    source = cross.draw(39, cross.dim, seed=10)
    wanted = cross.oracle(source)
    for tensor in (*cross.weights.values(), cross.factors, cross.states):
        kept = tensor.clone()
        tensor.copy_(kept.roll(1, -1))
        assert (cross.oracle(source) - wanted).norm() / wanted.norm() > 1e-3
        tensor.copy_(kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [256, 320, 512])
def test_chunks_of_256_and_more_change_no_bit(dtype: torch.dtype, chunk: int) -> None:
    cross = Cross(dtype, dim=128, text=64, heads=Heads(4, 4, 32), text_tokens=77)
    source = cross.draw(704, cross.dim, seed=10)
    whole, got = source.clone(), source.clone()
    cross.run(whole, 704)
    cross.run(got, chunk)
    assert torch.equal(got, whole)


@pytest.mark.parametrize("chunk", [1024, 4096, 16384])
def test_peak_at_the_sizes_of_sdxl(chunk: int) -> None:
    tokens, dim = 16384, 640
    with FakeTensorMode():
        cross = Cross(torch.bfloat16, dim, 2048, Heads(10, 10, 64), text_tokens=77)
        cross.states = torch.empty(77, 2048, dtype=torch.bfloat16)
        source = torch.empty(tokens, dim, dtype=torch.bfloat16)
        with Tracker(attention="flash") as tracker:
            cross.run(source, chunk)
    text = 2 * 77 * dim * 2
    statistics = 4 * 10 * chunk  # flash's logsumexp
    assert tracker.peak_bytes == 2 * chunk * dim * 2 + text + statistics
    assert tracker.current_bytes == 0


def test_two_calls_allocate_alike_and_leave_nothing() -> None:
    sequences = []
    for _ in range(2):
        with FakeTensorMode():
            cross = Cross(torch.bfloat16)
            source = torch.empty(1000, cross.dim, dtype=torch.bfloat16)
            with Tracker(log=True) as tracker:
                cross.run(source, 300)
        sequences.append(tracker.sequence())
        assert all(life.ticks is not None for life in sequences[-1])
    assert sequences[0] == sequences[1] and len(sequences[0]) > 10


def test_errors() -> None:
    cross = Cross(torch.float32)
    with pytest.raises(ValueError, match="chunk_tokens must be >= 1, got 0"):
        cross.run(cross.draw(39, cross.dim, seed=10), 0)
