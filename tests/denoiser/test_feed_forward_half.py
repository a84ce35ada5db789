"""The feed-forward half in chunks equals the plain one, and holds what its docstring says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pack.nodes.denoiser import reference
from pack.nodes.denoiser.cuts import HIDDEN_BLOCKS, DenoiserPlan
from pack.nodes.denoiser.feed_forward_half import add_feed_forward
from pack.nodes.denoiser.rows import ColumnsFn, Modulation, Projection, RowsFn, columns_of
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


LAYERS = frozenset(("w1", "w2", "w3"))
FETCHED = [LAYERS, LAYERS - {"w1"}, LAYERS - {"w3"}, frozenset()]


def _names(value: Any) -> str | None:
    return "+".join(sorted(value)) or "none" if isinstance(value, frozenset) else None


@dataclasses.dataclass
class Half:
    """Seeded weights of a feed-forward half: dim 24, hidden 50 (no multiple of the blocks)."""

    dtype: torch.dtype
    dim: int = 24
    hidden: int = 50
    spans: tuple[tuple[int, int], ...] = ()
    fetched: frozenset[str] = LAYERS  # layers whose weight is there; the others must be called

    def __post_init__(self) -> None:
        shapes = {
            "norm_in": (self.dim,),
            "w1": (self.hidden, self.dim),
            "w2": (self.dim, self.hidden),
            "w3": (self.hidden, self.dim),
            "norm_out": (self.dim,),
        }
        self.weights = {
            name: self.draw(*shape, seed=i) * shape[-1] ** -0.5 + (len(shape) == 1)
            for i, (name, shape) in enumerate(shapes.items())
        }
        self.factors = {
            name: [self.draw(self.dim, seed=10 * i + j) for j in range(len(self.spans))]
            for i, name in enumerate(("scale", "gate"), start=1)
        }

    def draw(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def norm(self, name: str) -> RowsFn:
        weight = self.weights[name]
        return lambda rows: functional.rms_norm(rows, weight.shape, weight, EPSILON)

    def projection(self, name: str) -> Projection:
        weight = self.weights[name]
        if name in self.fetched:
            return Projection(lambda: columns_of(weight, None))
        return Projection(
            lambda: lambda rows, first, last, _: functional.linear(rows, weight)[:, first:last],
            is_whole=True,
        )

    def modulation(self, name: str) -> Modulation:
        if not self.spans:
            return Modulation(())
        runs = zip(self.spans, self.factors[name], strict=True)
        return Modulation([(*span, factors) for span, factors in runs])

    def run(self, source: torch.Tensor, target: torch.Tensor, **options: Any) -> None:
        chunk, blocks = options.pop("chunk_tokens"), options.pop("hidden_blocks", 1)
        add_feed_forward(
            source,
            target,
            norm_in=self.norm("norm_in"),
            scale=self.modulation("scale"),
            **{name: self.projection(name) for name in ("w1", "w2", "w3")},
            norm_out=self.norm("norm_out"),
            gate=self.modulation("gate"),
            plan=DenoiserPlan(1, 1, chunk, hidden_blocks=blocks),
            **options,
        )

    def oracle(self, source: torch.Tensor) -> torch.Tensor:
        def by_token(name: str) -> torch.Tensor:
            if not self.spans:
                return source.new_ones(1, self.dim)
            runs = zip(self.spans, self.factors[name], strict=True)
            return torch.cat([f.expand(b - a, self.dim) for (a, b), f in runs])

        return reference.feed_forward_half(
            source, **self.weights, scale=by_token("scale"), gate=by_token("gate")
        )


SPANS = {"none": (), "one": ((0, 39),), "three": ((0, 5), (5, 6), (6, 39))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("chunk", [1, 6, 13, 39, 1000])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("fetched", FETCHED, ids=_names)
@pytest.mark.parametrize("blocks", [1, 4, 7, 1000])
def test_equals_the_oracle(
    dtype: torch.dtype, spans: Any, chunk: int, in_place: bool, fetched: frozenset[str], blocks: int
) -> None:
    half = Half(dtype, spans=spans, fetched=fetched)
    source = half.draw(39, 24, seed=9)
    before, wanted = source.clone(), half.oracle(source)
    target = source if in_place else torch.full_like(source, torch.nan)
    half.run(source, target, chunk_tokens=chunk, hidden_blocks=blocks)
    assert ((target - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]
    assert in_place or torch.equal(source, before)


def test_the_oracle_sees_every_weight() -> None:
    """The comparison above would notice a weight that is not used."""
    half = Half(torch.float32, spans=SPANS["three"])
    source = half.draw(39, 24, seed=9)
    wanted = half.oracle(source)
    tensors = [*half.weights.values(), *half.factors["scale"], *half.factors["gate"]]
    for tensor in tensors:
        kept = tensor.clone()
        tensor.copy_(kept.roll(1, 0))
        assert (half.oracle(source) - wanted).norm() / wanted.norm() > 1e-3
        tensor.copy_(kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [256, 320, 512])
@pytest.mark.parametrize("blocks", [1, 4])
def test_chunks_of_256_and_more_change_no_bit(dtype: torch.dtype, chunk: int, blocks: int) -> None:
    half = Half(dtype, dim=128, hidden=384, spans=((0, 300), (300, 704)))
    source = half.draw(704, 128, seed=9)
    whole, got = torch.empty_like(source), torch.empty_like(source)
    half.run(source, whole, chunk_tokens=704)
    half.run(source, got, chunk_tokens=chunk, hidden_blocks=blocks)
    assert torch.equal(got, whole)


@pytest.mark.parametrize("is_clamped", [False, True])
def test_half_precision_is_made_finite_as_in_the_host(is_clamped: bool) -> None:
    """Hidden values always; the result of w2 only with modulation."""
    half = Half(torch.float16, spans=((0, 39),) if is_clamped else ())
    half.weights["w1"] *= 300
    half.weights["w3"] *= 300  # the product is past 65504 here and there
    half.weights["w2"].fill_(60.0)  # and so is the sum
    source = half.draw(39, 24, seed=9).abs()
    target = torch.empty_like(source)
    half.run(source, target, chunk_tokens=16, is_clamped=is_clamped)
    h = half.norm("norm_in")(source)
    if is_clamped:
        h = h * half.factors["scale"][0]
    hidden = functional.silu(h @ half.weights["w1"].T) * (h @ half.weights["w3"].T)
    assert hidden.isinf().any()
    change = hidden.nan_to_num(0.0) @ half.weights["w2"].T
    assert change.isinf().any()
    assert target.isfinite().all() == is_clamped


@pytest.mark.parametrize("chunk", [512, 1024, 4352])
@pytest.mark.parametrize("fetched", FETCHED, ids=_names)
@pytest.mark.parametrize("blocks", [1, HIDDEN_BLOCKS])
def test_peak_at_the_sizes_of_z_image(chunk: int, fetched: frozenset[str], blocks: int) -> None:
    """Where w3 must be called, two hidden tensors live, as the second factor comes whole."""
    tokens, dim, hidden = 4352, 3840, 10240
    with FakeTensorMode():
        half = Half(torch.bfloat16, dim, hidden, spans=((0, tokens),), fetched=fetched)
        # The norm as CUDA has it: one tensor.
        half.norm = lambda _: torch.empty_like  # type: ignore[method-assign]
        source = torch.empty(tokens, dim, dtype=torch.bfloat16)
        with Tracker() as tracker:
            half.run(source, source, chunk_tokens=chunk, hidden_blocks=blocks)
    factors = 1 + 1 / blocks if "w3" in fetched else 2
    assert tracker.peak_bytes == chunk * (dim + factors * hidden) * 2
    assert tracker.current_bytes == 0
    whole = tokens * (dim + 3 * hidden) * 2
    assert tracker.peak_bytes < whole


def test_two_calls_allocate_alike_and_leave_nothing() -> None:
    sequences = []
    for _ in range(2):
        with FakeTensorMode():
            half = Half(torch.bfloat16, spans=((0, 1000),))
            source = torch.empty(1000, 24, dtype=torch.bfloat16)
            with Tracker(log=True) as tracker:
                half.run(source, source, chunk_tokens=300)
        sequences.append(tracker.sequence())
        assert all(life.ticks is not None for life in sequences[-1])
    assert sequences[0] == sequences[1] and len(sequences[0]) > 10


def test_errors() -> None:
    half = Half(torch.float32)
    source = half.draw(39, 24, seed=9)
    with pytest.raises(ValueError, match="chunk_tokens must be >= 1, got 0"):
        half.run(source, source, chunk_tokens=0)
    with pytest.raises(ValueError, match="hidden_blocks must be >= 1, got 0"):
        half.run(source, source, chunk_tokens=1, hidden_blocks=0)


def test_each_weight_is_fetched_once_where_it_is_first_used() -> None:
    """Names the bug: all three were fetched before w1 multiplied, so no copy overlapped a product.

    Copies that are still on their way when the first product begins hold it up.
    """
    half, events = Half(torch.float32), []

    def noted(name: str) -> Projection:
        def fetch() -> ColumnsFn:
            events.append(f"fetch {name}")
            multiply = columns_of(half.weights[name], None)
            return lambda *args: [events.append(name), multiply(*args)][1]

        return Projection(fetch)

    rows = half.draw(50, half.dim, seed=7)
    half.projection = noted  # type: ignore[method-assign]
    half.run(rows, rows, chunk_tokens=20, hidden_blocks=HIDDEN_BLOCKS)
    w3 = HIDDEN_BLOCKS * ["w3"]
    first = ["fetch w1", "w1", "fetch w3", *w3, "fetch w2", "w2"]
    assert events == [*first, *(2 * ["w1", *w3, "w2"])]
