"""Cross attention of a block: its tokens attend to a text, whose keys and values are made once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attention_half import AttendFn
from .attention_part import Heads
from .cuts import DenoiserPlan, chunks
from .rows import RowsFn


def add_cross_attention(
    source: torch.Tensor,
    *,
    modulated: Callable[[int, int], torch.Tensor],
    query: RowsFn,
    key: torch.Tensor,
    value: torch.Tensor,
    attend: AttendFn,
    out: RowsFn,
    add: Callable[[torch.Tensor, int], None],
    heads: Heads,
    plan: DenoiserPlan,
) -> None:
    """Adds out(attention of the modulated rows to the text) to a stream, chunk by chunk.

    Args:
        source: residual stream, [T, D], float.
        modulated: normed and modulated rows of a run of its tokens, new [t, D].
        query: those rows -> q, new [t, query * channels], norm included.
        key, value: of the whole text, [S, key_value * channels].
        attend: attention of a chunk of queries to all keys.
        out: query * channels -> D.
        add: adds rows to the stream, from that token on; may write over them.
        heads: head counts.
        plan: its feed_tokens; a multiple of 64 tokens keeps the CPU's attention bit-exact.

    Raises:
        ValueError: feed_tokens < 1.

    Memory: 2 * feed_tokens * max(D, query * channels) elements, and what `attend` holds beside its
        result.
    Exact: bit-exact on CPU (rows are independent).
    """

    def by_head(rows: torch.Tensor) -> torch.Tensor:
        # [T, H * C] -> [1, H, T, C]
        return rows.view(rows.shape[0], -1, heads.channels).movedim(0, 1)[None]

    keys, values = by_head(key), by_head(value)
    for start, stop in chunks(source.shape[0], plan.feed_tokens):
        rows = modulated(start, stop)
        queries = by_head(query(rows))
        del rows  # before attend allocates its result
        attended = attend(queries, keys, values)[0]
        del queries  # before out allocates its result
        change = out(attended)
        del attended
        add(change, start)
        del change  # before the next chunk allocates
