"""How a block with a parallel feed-forward is cut: what it holds and launches. Integers only."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from .cuts import CHUNK_MULTIPLE, HIDDEN_BLOCKS, DenoiserPlan, chunk_count, longest_chunk
from .products import product_elements
from .sizes import TransformerSizes, round_up

# Norm, scale and shift of a chunk's rows; gate and sum of a result.
NORMED, ADDED = 2, 2
# Norm, rotation and copy of k; of q, whose place they take.
KEY_ROTATED, QUERY_ROTATED = 3, 2
# "balance" allows stream, q, k, v and this share of a stream, if a quarter of the host's is less.
BALANCE_ROOM = 3 / 4
# Of what the host holds, where a projection gives all its columns: what "speed" allows.
WHOLE_SHARE = 0.97
# Column blocks of the hidden rows.
BLOCKS = (1, 2, HIDDEN_BLOCKS)


def parallel_elements(sizes: TransformerSizes, tokens: int, plan: DenoiserPlan) -> int:
    """Elements that `add_parallel` holds beside the stream, and what is made of its results.

    q, or what was attended to, k and v of one group, and a chunk's rows. Then what is still to be
    joined; of a chunk its rows, those joined with the hidden ones, and a block of those. With
    `holds_hidden` the hidden rows beside q, and all that a projection gives of a chunk.
    """
    cut = plan.attention(sizes.kv_heads, is_whole=sizes.is_whole)
    group = (cut.spans[0][1] - cut.spans[0][0]) * sizes.head_dim
    chunk, dim, hidden = longest_chunk(tokens, plan.chunk_tokens), sizes.dim, sizes.ffn_dim
    beside = functools.partial(product_elements, sizes, plan, chunk)
    # All that a projection gives of a chunk.
    whole = chunk * _product(sizes) + beside(dim, _product(sizes), is_written=False)
    if plan.holds_hidden:
        return tokens * (3 * dim + hidden) + chunk * dim + whole
    # The columns of k and v join if they are of all heads.
    made = beside(dim, 2 * group if group == dim else group)
    factors = beside(dim, hidden)
    if sizes.is_whole:
        made = factors = whole
    elif sizes.is_gated:
        second = -(-hidden // plan.hidden_blocks)
        factors = max(factors, chunk * second + beside(dim, second, is_written=False))
    attention = tokens * (dim + 2 * group) + chunk * dim + made
    joining = tokens * dim + chunk * (dim + hidden)
    return max(attention, joining + max(factors, beside(dim + hidden, dim, is_written=False)))


def _product(sizes: TransformerSizes) -> int:
    """Columns of the first projection."""
    return 3 * sizes.dim + (2 if sizes.is_gated else 1) * sizes.ffn_dim


def stock_parallel_elements(sizes: TransformerSizes, tokens: int) -> int:
    """Elements of the host's block while a projection multiplies, its stream among them.

    The first's product beside its rows; or both halves, what joins them, and the last's product.
    """
    dim, joined, product = sizes.dim, sizes.dim + sizes.ffn_dim, _product(sizes)
    copied = dim if sizes.is_copied else 0
    first = tokens * (2 * dim + product) + copied * product
    return max(first, tokens * (2 * dim + 2 * joined) + copied * joined)


def parallel_launches(sizes: TransformerSizes, tokens: int, plan: DenoiserPlan) -> int:
    """Launches for one sample, with plain weights and kernels that rotate in place."""
    groups = len(plan.attention(sizes.kv_heads, is_whole=sizes.is_whole).spans)
    # The columns of k and v join if they are of all heads.
    made = NORMED + 2 + (groups > 1) + KEY_ROTATED
    attended = QUERY_ROTATED + 1 + (groups > 1)
    # The rows, the first factor, its activation, what was attended to, the product.
    joined = NORMED + 2 + 1 + 1 + ADDED + (2 * plan.hidden_blocks if sizes.is_gated else 0)
    runs = chunk_count(tokens, plan.chunk_tokens)
    return runs * (groups * (made + attended) + joined)


def parallel_plan(
    sizes: TransformerSizes,
    batch: int,
    tokens: int,
    base: DenoiserPlan,
    *,
    groups: Sequence[int],
    chunks: Sequence[int],
    limit: float,
    slack: float,
) -> DenoiserPlan:
    """The plan with the fewest launches within a limit, else about the smallest.

    Args:
        batch: samples in the stream; a block takes them one by one.
        base: what the plan has besides.
        groups, chunks: of heads and of tokens, to choose from.
        limit: elements of stream and block; 0 for as few as possible.
        slack: fewer launches are taken for this factor of the fewest elements.
    """
    plans = [
        replace(
            base, groups=n, chunk_tokens=c, feed_tokens=c, holds_query=True, hidden_blocks=blocks
        )
        for n in groups
        for c in chunks
        for blocks in (BLOCKS if sizes.is_gated else (1,))
    ]
    stream = batch * tokens * sizes.dim
    if sizes.is_whole:
        plans, limit = _of_whole(sizes, batch, tokens, plans, limit)
    weighed = [
        (stream + parallel_elements(sizes, tokens, p), parallel_launches(sizes, tokens, p), p)
        for p in plans
    ]
    least = slack * min(held for held, _, _ in weighed)
    room = stream + (3 + BALANCE_ROOM) * tokens * sizes.dim if limit and not sizes.is_whole else 0
    limit = max(least, limit, room)
    return min((w for w in weighed if w[0] <= limit), key=lambda w: (w[1], w[0]))[2]


def _of_whole(
    sizes: TransformerSizes, batch: int, tokens: int, plans: list[DenoiserPlan], limit: float
) -> tuple[list[DenoiserPlan], float]:
    """Plans and limit where a projection gives all its columns at each call.

    To hold its hidden rows costs less time than to call it again, and more memory, as long as that
    is no more than the host holds. So chunks may be short.
    """
    short = round_up(-(-tokens // 4), CHUNK_MULTIPLE)
    plans += [replace(plan, chunk_tokens=short, feed_tokens=short) for plan in plans[:1]]
    once = [replace(plan, groups=1, holds_hidden=True) for plan in plans]
    if not limit:
        return plans + once, limit
    of_block = stock_parallel_elements(sizes, batch * tokens)
    of_host = WHOLE_SHARE * max(batch * tokens * sizes.stock_elements, of_block)
    room = of_host - batch * tokens * sizes.dim
    once = [plan for plan in once if parallel_elements(sizes, tokens, plan) <= room]
    return once or plans, min(limit, of_host)
