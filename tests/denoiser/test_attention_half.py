"""The attention half in groups of heads equals the plain one, and holds what its docstring says."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from pack.nodes.denoiser import reference
from pack.nodes.denoiser.attention_half import (
    add_attention,
    add_joint_attention,
)
from pack.nodes.denoiser.attention_part import Heads, Part
from pack.nodes.denoiser.cuts import DenoiserPlan
from pack.nodes.denoiser.rows import Columns, Modulation, Projection, RowsFn, columns_of
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

EPSILON = 1e-5
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@dataclasses.dataclass
class Half:
    """Seeded weights of an attention half."""

    dtype: torch.dtype
    tokens: int = 39
    heads: Heads = Heads(6, 6, 8)  # noqa: RUF009 (immutable)
    spans: tuple[tuple[int, int], ...] = ()
    has_weights: bool = True

    def __post_init__(self) -> None:
        self.calls = Counter[str]()  # of layers without weights
        query, key_value, channels = self.heads
        self.dim = query * channels
        shapes = {
            "norm_in": (self.dim,),
            "qkv": ((query + 2 * key_value) * channels, self.dim),
            "query_norm": (channels,),
            "key_norm": (channels,),
            "out": (self.dim, self.dim),
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
        angles = self.draw(self.tokens, channels // 2, seed=8).float()
        parts = (angles.cos(), -angles.sin(), angles.sin(), angles.cos())
        self.table = torch.stack(parts, dim=-1).unflatten(-1, (2, 2))

    def draw(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.dtype)

    def norm(self, name: str) -> RowsFn:
        weight = self.weights[name]
        return lambda rows: functional.rms_norm(rows, weight.shape, weight, EPSILON)

    def projection(self, name: str) -> Projection:
        weight = self.weights[name]
        if self.has_weights:
            return Projection(lambda: columns_of(weight, None))

        def multiply(
            rows: torch.Tensor, first: int, last: int | None, into: torch.Tensor | None
        ) -> torch.Tensor:
            assert into is None  # such a layer is never asked to
            self.calls[name] += 1
            return functional.linear(rows, weight)[:, first:last]

        return Projection(lambda: multiply, is_whole=True)

    def rotate(self, query: torch.Tensor | None, key: torch.Tensor | None, start: int) -> None:
        for name, rows in (("query_norm", query), ("key_norm", key)):
            if rows is not None:
                table = self.table[start : start + rows.shape[0], None]
                pairs = self.norm(name)(rows).float().unflatten(-1, (-1, 1, 2))
                turned = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
                rows.copy_(turned.flatten(-2))

    def modulation(self, name: str) -> Modulation:
        if not self.spans:
            return Modulation(())
        runs = zip(self.spans, self.factors[name], strict=True)
        return Modulation([(*span, factors) for span, factors in runs])

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape[1] == k.shape[1] == v.shape[1] and k.shape[2] == self.tokens
        attended = functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).flatten(2)

    def run(self, source: torch.Tensor, target: torch.Tensor, **options: Any) -> None:
        scratch = options.pop("scratch", None)
        add_attention(
            source,
            target,
            norm_in=self.norm("norm_in"),
            scale=self.modulation("scale"),
            qkv=self.projection("qkv"),
            rotate=self.rotate,
            attend=self.attend,
            out=self.projection("out"),
            norm_out=self.norm("norm_out"),
            gate=self.modulation("gate"),
            heads=self.heads,
            plan=DenoiserPlan(feed_tokens=1, **options),
            scratch=scratch,
        )

    def oracle(self, source: torch.Tensor) -> torch.Tensor:
        def by_token(name: str) -> torch.Tensor:
            if not self.spans:
                return source.new_ones(1, self.dim)
            runs = zip(self.spans, self.factors[name], strict=True)
            return torch.cat([f.expand(b - a, self.dim) for (a, b), f in runs])

        return reference.attention_half(
            source,
            **self.weights,
            table=self.table,
            scale=by_token("scale"),
            gate=by_token("gate"),
        )

    def check(self, *, in_place: bool = False, has_scratch: bool = False, **options: Any) -> None:
        source = self.draw(self.tokens, self.dim, seed=9)
        before, wanted = source.clone(), self.oracle(source)
        target = source if in_place else torch.full_like(source, torch.nan)
        if has_scratch:
            options["scratch"] = target
        self.run(source, target, **options)
        assert ((target - wanted).norm() / wanted.norm()).item() < TOLERANCE[self.dtype]
        assert in_place or torch.equal(source, before)


SPANS = {"none": (), "one": ((0, 39),), "three": ((0, 5), (5, 6), (6, 39))}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("groups", [1, 2, 4, 6, 100])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("holds", [False, True])
def test_equals_the_oracle(
    dtype: torch.dtype, spans: Any, groups: int, in_place: bool, holds: bool
) -> None:
    half = Half(dtype, spans=spans)
    half.check(in_place=in_place, groups=groups, chunk_tokens=13, holds_query=holds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [Heads(17, 17, 8), Heads(34, 17, 8)], ids=["own", "shared"])
@pytest.mark.parametrize("groups", [3, 17])
def test_queries_may_be_held(dtype: torch.dtype, heads: Heads, groups: int) -> None:
    """Earlier groups attend to more queries at a time than the last one."""
    half = Half(dtype, heads=heads, spans=SPANS["three"])
    half.check(groups=groups, chunk_tokens=13, holds_query=True)
    half.check(groups=groups, chunk_tokens=2, holds_query=True, has_scratch=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4, 6])
def test_the_target_may_hold_what_earlier_groups_attended_to(
    dtype: torch.dtype, groups: int
) -> None:
    Half(dtype, spans=SPANS["three"]).check(has_scratch=True, groups=groups, chunk_tokens=13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("chunk", [1, 6, 38, 39, 1000])
def test_equals_the_oracle_in_chunks(dtype: torch.dtype, groups: int, chunk: int) -> None:
    half = Half(dtype, spans=SPANS["three"])
    half.check(in_place=True, groups=groups, chunk_tokens=chunk)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_value", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_query_heads_that_share_keys(dtype: torch.dtype, key_value: int, groups: int) -> None:
    half = Half(dtype, heads=Heads(6, key_value, 8), spans=SPANS["three"])
    half.check(groups=groups, chunk_tokens=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_layers_that_only_multiply_themselves(dtype: torch.dtype, groups: int) -> None:
    half = Half(dtype, has_weights=False, spans=SPANS["three"])
    half.check(in_place=True, groups=groups, chunk_tokens=16)
    assert half.calls == {"qkv": 3, "out": 3}
    half.check(in_place=True, groups=groups, chunk_tokens=39)
    assert half.calls == {"qkv": 4, "out": 4}
    half.check(has_scratch=True, groups=groups, chunk_tokens=16)


def test_the_oracle_sees_every_weight() -> None:
    """The comparisons above would notice a weight that is not used."""
    half = Half(torch.float32, spans=SPANS["three"])
    source = half.draw(39, half.dim, seed=9)
    wanted = half.oracle(source)
    for tensor in [
        *half.weights.values(), half.table, *half.factors["scale"], *half.factors["gate"],
    ]:  # fmt: skip
        kept = tensor.clone()
        tensor.copy_(kept.roll(1, 0))
        # A segment of one token counts least.
        assert (half.oracle(source) - wanted).norm() / wanted.norm() > 1e-3
        tensor.copy_(kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("chunk", [256, 320, 512])
@pytest.mark.parametrize("holds", [False, True])
def test_chunks_of_256_and_more_change_no_bit(
    dtype: torch.dtype, groups: int, chunk: int, holds: bool
) -> None:
    half = Half(dtype, 704, Heads(3, 3, 128), spans=((0, 300), (300, 704)))
    source = half.draw(704, half.dim, seed=9)
    whole, got = torch.empty_like(source), torch.empty_like(source)
    half.run(source, whole, groups=1, chunk_tokens=704)
    half.run(source, got, groups=groups, chunk_tokens=chunk, holds_query=holds)
    assert torch.equal(got, whole)


def test_half_precision_is_made_finite_after_the_output_projection() -> None:
    half = Half(torch.float16)
    half.weights["out"].fill_(60000.0)
    source = half.draw(39, half.dim, seed=9)
    target = torch.empty_like(source)
    attended: list[torch.Tensor] = []
    attend = half.attend

    def listening(*qkv: torch.Tensor) -> torch.Tensor:
        attended.append(attend(*qkv)[0])
        return attended[-1][None]

    half.attend = listening  # type: ignore[method-assign]
    half.run(source, target, groups=1, chunk_tokens=16)
    assert (torch.cat(attended) @ half.weights["out"].T).isinf().any()
    assert target.isfinite().all()


def _peak(half: Half, **options: Any) -> int:
    """Bytes held at Z-Image's sizes; the norm and attention make their results."""
    half.norm = lambda _: torch.empty_like  # type: ignore[method-assign]
    half.rotate = lambda *_: None  # type: ignore[method-assign]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert k.shape == v.shape and q.shape[1] == k.shape[1]
        return q.new_empty(1, q.shape[2], q.shape[1] * q.shape[3])

    half.attend = attend  # type: ignore[method-assign]
    source = torch.empty(half.tokens, half.dim, dtype=half.dtype)
    with Tracker() as tracker:
        half.run(source, source, **options)
    assert tracker.current_bytes == 0
    return tracker.peak_bytes


@pytest.mark.parametrize("groups", [1, 2, 3, 5, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("chunk", [256, 1024, 4352])
@pytest.mark.parametrize("holds", [False, True])
def test_peak_at_the_sizes_of_z_image(groups: int, chunk: int, holds: bool) -> None:
    tokens, heads = 4352, Heads(30, 30, 128)
    with FakeTensorMode():
        half = Half(torch.bfloat16, tokens, heads, spans=((0, tokens),))
        peak = _peak(half, groups=groups, chunk_tokens=chunk, holds_query=holds)
    # Of the last group, above what all groups hold: k, v and maybe q, less what it need not store.
    held = tokens * 3840 * (groups + 1 + holds) // groups
    assert peak == (held + 2 * chunk * 3840) * 2


def test_peak_where_the_last_group_is_smaller() -> None:
    """Groups of 8, 8, 8 and 6: the third one's k and v stand beside the buffer of 24 heads."""
    tokens, chunk = 4352, 256
    with FakeTensorMode():
        half = Half(torch.bfloat16, tokens, Heads(30, 30, 128), spans=((0, tokens),))
        peak = _peak(half, groups=4, chunk_tokens=chunk)
    held = tokens * (24 + 2 * 8) * 128 * 2
    assert held < peak <= held + 2 * chunk * 3840 * 2


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_peak_with_shared_keys(groups: int) -> None:
    """Lumina 2: 24 query heads on 8 of keys, which are copied for attention."""
    tokens, chunk = 4352, 256
    with FakeTensorMode():
        half = Half(torch.bfloat16, tokens, Heads(24, 8, 96), spans=((0, tokens),))
        peak = _peak(half, groups=groups, chunk_tokens=chunk)
    heads = 8 // groups
    held = 24 - 3 * heads
    copied = tokens * (held + heads * (2 + 2 * 3)) * 96 * 2
    attended = tokens * (held + heads * 2 * 3) * 96 * 2 + 2 * chunk * half.dim * 2
    assert peak == max(copied, attended)


def test_peak_of_layers_that_only_multiply_themselves() -> None:
    """q, k and v of all heads come at once, chunk by chunk, so groups would save nothing."""
    tokens, chunk = 4352, 256
    with FakeTensorMode():
        half = Half(
            torch.bfloat16, tokens, Heads(30, 30, 128), spans=((0, tokens),), has_weights=False
        )
        peak = _peak(half, groups=5, chunk_tokens=chunk)
        whole = _peak(half, groups=5, chunk_tokens=tokens)
    assert peak == (3 * tokens + 4 * chunk) * 3840 * 2
    assert whole == 5 * tokens * 3840 * 2  # the product is the buffer


@pytest.mark.parametrize("groups", [1, 3])
def test_two_calls_allocate_alike_and_leave_nothing(groups: int) -> None:
    sequences = []
    for _ in range(2):
        with FakeTensorMode():
            half = Half(torch.bfloat16, 1000, spans=((0, 1000),))
            source = torch.empty(1000, half.dim, dtype=torch.bfloat16)
            with Tracker(log=True) as tracker:
                half.run(source, source, groups=groups, chunk_tokens=300)
        sequences.append(tracker.sequence())
        assert all(life.ticks is not None for life in sequences[-1])
    assert sequences[0] == sequences[1] and len(sequences[0]) > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0, "chunk_tokens": 1}, "groups must be >= 1, got 0"),
        ({"groups": 1, "chunk_tokens": 0}, "chunk_tokens must be >= 1, got 0"),
    ],
)
def test_errors(options: dict[str, int], message: str) -> None:
    half = Half(torch.float32)
    source = half.draw(39, half.dim, seed=9)
    with pytest.raises(ValueError, match=message):
        half.run(source, source, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_norms_that_span_all_heads(
    groups: int, holds: bool, chunk: int, dtype: torch.dtype
) -> None:
    """As Wan's, with a layer each for q, k and v."""
    half = Half(dtype, has_weights=False)
    heads, dim = half.heads, half.dim
    layers = [half.draw(dim, dim, seed=20 + i) * dim**-0.5 for i in range(4)]
    weights = [half.draw(dim, seed=30 + i) + 1 for i in range(2)]
    norms = [lambda rows, w=w: functional.rms_norm(rows, (dim,), w, EPSILON) for w in weights]
    source = half.draw(half.tokens, dim, seed=9)
    target = torch.empty_like(source)

    def rotate(query: torch.Tensor | None, key: torch.Tensor | None, start: int) -> None:
        for rows in (query, key):
            if rows is not None:
                table = half.table[start : start + rows.shape[0], None]
                pairs = rows.float().unflatten(-1, (-1, 1, 2))
                turned = table[..., 0] * pairs[..., 0] + table[..., 1] * pairs[..., 1]
                rows.copy_(turned.flatten(-2))

    def add(change: torch.Tensor, start: int) -> None:
        stop = start + change.shape[0]
        torch.add(source[start:stop], change, out=target[start:stop])

    query, key, value, out = (Projection(lambda w=weight: columns_of(w, None)) for weight in layers)
    part = Part(
        source,
        lambda start, stop: half.norm("norm_in")(source[start:stop]),
        Columns(query),
        Columns(key),
        Columns(value),
        rotate,
        out=lambda attended, start: out(attended),
        add=add,
        scratch=target,
        norms=(norms[0], norms[1]),
    )
    plan = DenoiserPlan(groups, chunk, 1, holds_query=holds)
    add_joint_attention([part], attend=half.attend, heads=heads, plan=plan)

    rows = half.norm("norm_in")(source)
    made = [norm(rows @ w.t()) for norm, w in zip(norms, layers, strict=False)]
    q, k = (each.unflatten(1, (heads.query, -1)) for each in made)
    rotate(q, k, 0)
    v = (rows @ layers[2].t()).unflatten(1, (heads.query, -1))
    attended = half.attend(*(each.movedim(0, 1)[None] for each in (q, k, v)))[0]
    wanted = source + attended @ layers[3].t()
    assert ((target - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]
