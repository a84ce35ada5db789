"""How a block with a parallel feed-forward is cut: what it holds and launches. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .cuts import HIDDEN_BLOCKS, DenoiserPlan, chunk_count, longest_chunk
from .sizes import TransformerSizes

# Norm, scale and shift of a chunk's rows; gate and sum of a result.
NORMED, ADDED = 2, 2
# Norm, rotation and copy of k; of q, whose place they take.
KEY_ROTATED, QUERY_ROTATED = 3, 2
# "balance" allows stream, q, k, v and this share of a stream, if a quarter of the host's is less.
BALANCE_ROOM = 3 / 4
# Column blocks of the hidden rows.
BLOCKS = (1, 2, HIDDEN_BLOCKS)


def parallel_elements(sizes: TransformerSizes, tokens: int, plan: DenoiserPlan) -> int:
    """Elements that `add_parallel` holds beside the stream, and what is made of its results.

    q, or what was attended to, k and v of one group, and a chunk's rows. Then what is still to be
    joined; of a chunk its rows, those joined with the hidden ones, and a block of those.
    """
    cut = plan.attention(sizes.kv_heads, is_whole=sizes.is_whole)
    group = (cut.spans[0][1] - cut.spans[0][0]) * sizes.head_dim
    chunk, dim, hidden = longest_chunk(tokens, plan.chunk_tokens), sizes.dim, sizes.ffn_dim
    product = 3 * dim + (2 if sizes.is_gated else 1) * hidden
    made = second = 0
    if sizes.is_whole:  # what a projection gives
        made = second = product
    elif sizes.is_gated:
        second = -(-hidden // plan.hidden_blocks)
    attention = tokens * (dim + 2 * group) + chunk * (dim + made)
    joining = tokens * dim + chunk * (dim + hidden)
    return max(attention, joining, joining + chunk * second)


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
    weighed = [
        (stream + parallel_elements(sizes, tokens, p), parallel_launches(sizes, tokens, p), p)
        for p in plans
    ]
    least = slack * min(held for held, _, _ in weighed)
    room = stream + (3 + BALANCE_ROOM) * tokens * sizes.dim if limit else 0
    limit = max(least, limit, room)
    return min((w for w in weighed if w[0] <= limit), key=lambda w: (w[1], w[0]))[2]
