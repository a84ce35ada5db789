"""A block with a parallel feed-forward equals the plain one, and holds what its plan says."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from pack.nodes.cuts import pieces
from pack.nodes.denoiser.attention_part import Heads, Part
from pack.nodes.denoiser.cuts import DenoiserPlan, chunks
from pack.nodes.denoiser.mlp import Hidden
from pack.nodes.denoiser.parallel import add_parallel
from pack.nodes.denoiser.parallel_plan import parallel_elements
from pack.nodes.denoiser.products import columns_at_a_time
from pack.nodes.denoiser.rows import Columns, Projection, columns_of
from pack.nodes.denoiser.sizes import TransformerSizes
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclasses.dataclass
class Block:
    """Seeded weights: first gives q, k, v and the hidden rows' factors; last takes both halves.

    kind: plain; whole: each call gives all columns; new: columns come in new tensors, of rows that
        are quantised in a byte; copied: a copy of the weight is made, some columns at a time.
    """

    dtype: torch.dtype = torch.float32
    tokens: int = 39
    heads: int = 6
    channels: int = 8
    hidden: int = 40
    is_gated: bool = True
    kind: str = "plain"

    def __post_init__(self) -> None:
        self.dim = self.heads * self.channels
        factors = 2 if self.is_gated else 1
        self.first = self.draw(3 * self.dim + factors * self.hidden, self.dim, seed=1)
        self.last = self.draw(self.dim, self.dim + self.hidden, seed=2)
        self.turned = self.draw(self.tokens, 1, self.channels, seed=3)

    def draw(self, *shape: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(self.dtype)

    def projection(self, weight: torch.Tensor, plan: DenoiserPlan) -> Projection:
        def whole(rows: Any, first: int, last: Any, into: Any) -> torch.Tensor:
            self.calls += 1
            return functional.linear(rows, weight)[:, first:last]

        def new(rows: Any, first: int, last: Any, into: Any) -> torch.Tensor:
            of_byte = torch.empty_like(rows, dtype=torch.int8)
            product = functional.linear(rows, weight[first:last])
            assert of_byte.shape == rows.shape
            return product if into is None else into.copy_(product)

        def copied(rows: Any, first: int, last: Any, into: Any) -> torch.Tensor:
            last = len(weight) if last is None else last
            into = rows.new_empty(len(rows), last - first) if into is None else into
            step = columns_at_a_time(weight.shape[1], plan.copy_elements)
            for begin, end in pieces(last - first, step):
                part = weight[first + begin : first + end].clone()
                columns_of(part, None)(rows, 0, None, into[:, begin:end])
                del part
            return into

        if self.kind == "whole":
            return Projection(lambda: whole, is_whole=True)
        if self.kind == "plain":
            return Projection(lambda: columns_of(weight, None))
        return Projection(lambda: new if self.kind == "new" else copied)

    def run(self, stream: torch.Tensor, plan: DenoiserPlan) -> None:
        self.calls = 0
        first, last = self.projection(self.first, plan), self.projection(self.last, plan)
        begins = [3 * self.dim, 3 * self.dim + self.hidden]
        second = Columns(first, begins[1]) if self.is_gated else None
        silu_ = functools.partial(functional.silu, inplace=True)
        hidden = Hidden(self.hidden, Columns(first, begins[0]), second, silu_)
        modulated = lambda start, stop: 2 * stream[start:stop]  # noqa: E731

        def rotate(query: Any, key: torch.Tensor, start: int) -> None:
            assert query is None
            key.mul_(self.turned[start : start + len(key)])

        def turn(query: torch.Tensor, start: int) -> torch.Tensor:
            return query * self.turned[start : start + len(query)]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

        def out(attended: torch.Tensor, start: int) -> torch.Tensor:
            if plan.holds_hidden:
                return last(attended)
            count, dim = attended.shape
            whole = attended.new_empty(count, dim + self.hidden)
            whole[:, :dim] = attended
            del attended
            hidden.write(modulated(start, start + count), whole[:, dim:], plan)
            return last(whole)

        columns = [Columns(first, index * self.dim) for index in range(3)]
        add = lambda change, start: stream[start : start + len(change)].add_(change)  # noqa: E731
        part = Part(stream, modulated, *columns, rotate, out=out, add=add)  # type: ignore[misc]
        heads = Heads(self.heads, self.heads, self.channels)
        held = hidden if plan.holds_hidden else None
        add_parallel(part, turn=turn, attend=attend, heads=heads, plan=plan, hidden=held)

    def oracle(self, stream: torch.Tensor) -> torch.Tensor:
        """In float64."""
        stream, first, last, turned = (
            tensor.double() for tensor in (stream, self.first, self.last, self.turned)
        )
        made = functional.linear(2 * stream, first)
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in made.split(self.dim, 1)[:3])
        scores = torch.einsum("thc,shc->hts", q * turned, k * turned) * self.channels**-0.5
        attended = torch.einsum("hts,shc->thc", scores.softmax(-1), v).flatten(1)
        hidden = functional.silu(made[:, 3 * self.dim :][:, : self.hidden])
        if self.is_gated:
            hidden = hidden * made[:, 3 * self.dim + self.hidden :]
        return stream + functional.linear(torch.cat((attended, hidden), 1), last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("kind", ["plain", "whole", "new", "copied"])
@pytest.mark.parametrize("groups", [1, 2, 4, 6])
@pytest.mark.parametrize("chunk", [39, 40, 1, 16])
def test_equals_the_oracle(
    dtype: torch.dtype, is_gated: bool, kind: str, groups: int, chunk: int
) -> None:
    block = Block(dtype, is_gated=is_gated, kind=kind)
    stream = block.draw(39, block.dim, seed=9)
    wanted = block.oracle(stream)
    block.run(stream, DenoiserPlan(groups, chunk, chunk, hidden_blocks=3))
    assert ((stream - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("chunk", [39, 40, 1, 16])
def test_a_whole_projection_is_called_once_where_hidden_rows_wait(
    dtype: torch.dtype, is_gated: bool, chunk: int
) -> None:
    block = Block(dtype, is_gated=is_gated, kind="whole")
    stream = block.draw(39, block.dim, seed=9)
    wanted = block.oracle(stream)
    plan = DenoiserPlan(1, chunk, chunk, holds_hidden=True)
    block.run(stream, plan)
    assert ((stream - wanted).norm() / wanted.norm()).item() < TOLERANCE[dtype]
    assert block.calls == 2 * len(chunks(39, chunk))
    block.run(stream, dataclasses.replace(plan, holds_hidden=False))
    assert block.calls == 3 * len(chunks(39, chunk))


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole": {"is_whole": True},
    "new": {"is_quantised": True, "row_bits": 8},
    "copied": {"is_copied": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 2, 24])
@pytest.mark.parametrize("chunk", [256, 1536, 4608])
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("holds_hidden", [True, False])
def test_peak_at_the_sizes_of_flux(
    is_gated: bool, chunk: int, groups: int, kind: str, holds_hidden: bool
) -> None:
    if holds_hidden and (kind != "whole" or groups > 1):
        pytest.skip("only of a projection that comes whole")
    tokens, dim = 4608, 3072
    sizes = TransformerSizes(
        dim=dim, heads=24, kv_heads=24, head_dim=128, ffn_dim=4 * dim, is_gated=is_gated,
        **KINDS[kind],
    )  # fmt: skip
    plan = DenoiserPlan(
        groups, chunk, chunk, hidden_blocks=2, holds_hidden=holds_hidden, copy_elements=2**24
    )
    with FakeTensorMode(), Tracker(attention="flash") as tracker:
        block = Block(torch.bfloat16, tokens, 24, 128, 4 * dim, is_gated=is_gated, kind=kind)
        stream = torch.empty(tokens, dim, dtype=torch.bfloat16)
        before = tracker.current_bytes
        tracker.restart_peak()
        block.run(stream, plan)
        assert tracker.current_bytes == before
    held = (tracker.peak_bytes - before) / 2
    assert held == pytest.approx(parallel_elements(sizes, tokens, plan), rel=0.01)


@pytest.mark.parametrize(
    ("groups", "chunk", "message"),
    [(0, 1, "groups must be >= 1, got 0"), (1, 0, "chunk_tokens must be >= 1, got 0")],
)
def test_errors(groups: int, chunk: int, message: str) -> None:
    block = Block()
    with pytest.raises(ValueError, match=message):
        block.run(block.draw(39, block.dim, seed=9), DenoiserPlan(groups, chunk, chunk))
