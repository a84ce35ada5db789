"""A block whose feed-forward runs beside its attention, on the same rows, into one projection."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .attention_half import AttendFn
from .attention_part import Heads, Part
from .cuts import DenoiserPlan, chunks
from .mlp import Hidden
from .rows import write_columns

# Norm and rotary embedding of q, [T, heads, head_dim], and the token of its first row: new rows, or
# those that were given.
TurnFn = Callable[[torch.Tensor, int], torch.Tensor]


def add_parallel(
    part: Part,
    *,
    turn: TurnFn,
    attend: AttendFn,
    heads: Heads,
    plan: DenoiserPlan,
    hidden: Hidden | None = None,
) -> None:
    """As `add_joint_attention` of one part, which adds nothing before k and v are gone.

    So its `out`, which joins the feed-forward, may hold as much as k and v did, in fewer chunks. q
    is made chunk by chunk; what a chunk attends to takes its place, and is given away to `out`.

    Args:
        part: with as many heads of keys as of queries, and one projection for q, k and v.
        turn: norm and rotary embedding of q.
        attend, heads, plan: see `add_joint_attention`.
        hidden: of the projection of q, k and v, which comes whole and is called once: its hidden
            rows wait behind q, and `out` gets [t, query * channels + H].

    Raises:
        ValueError: groups or chunk_tokens < 1.

    Memory: with S the tokens and G the groups: S * D * (1 + 2 / G) + chunk_tokens * D elements;
        then what chunks attended to, those to come and the one that `out` joins. With `hidden`
        S * H more, and chunk_tokens times what the projection gives.
    Exact: bit-exact on CPU.
    """
    source, channels = part.source, heads.channels
    tokens, width = source.shape[0], heads.query * channels
    cut = plan.attention(heads.key_value, is_whole=part.query.projection.is_whole)
    runs = chunks(tokens, plan.chunk_tokens)
    beside = 0 if hidden is None else hidden.width
    held = [source.new_empty(stop - start, width + beside) for start, stop in runs]

    def by_head(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(rows.shape[0], -1, channels)

    def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(*(rows.movedim(0, 1)[None] for rows in (query, key, value)))[0]

    for first, last in cut.spans:
        begin, end = first * channels, last * channels
        shared = source.new_empty(tokens, 2 * (end - begin))
        key, value = map(by_head, shared.split(end - begin, dim=1))
        for made, (start, stop) in zip(held, runs, strict=True):
            _make(part, start, begin, made[:, begin:end], shared[start:stop], hidden, made)
            part.rotate(None, key[start:stop], start)
        del made  # pyright: ignore[reportPossiblyUnboundVariable]
        for index, (start, _) in enumerate(runs):
            if len(cut.spans) > 1 or beside:
                query = turn(by_head(held[index][:, begin:end]), start)
                held[index][:, begin:end] = attended(query, key, value)
                del query
            else:  # what was given goes with each step
                held[index] = turn(by_head(held[index]), start)
                held[index] = attended(held[index], key, value)
        del shared, key, value  # before the next group's are made
    for start, _ in runs:
        change = part.out(held.pop(0), start)
        part.add(change, start)
        del change  # before the next chunk's


def _make(
    part: Part,
    start: int,
    begin: int,
    queries: torch.Tensor,
    shared: torch.Tensor,
    hidden: Hidden | None,
    made: torch.Tensor,
) -> None:
    """Writes columns of q, and those of k and v side by side, of a run of tokens.

    Args:
        hidden: is written too, in the last columns of `made`.
    """
    count, width = queries.shape
    rows = part.modulated(start, start + count)
    wanted = [(columns, begin, begin + width) for columns in part.columns]
    if not part.query.projection.is_whole:
        write_columns(rows, wanted[:1], queries)
        write_columns(rows, wanted[1:], shared)
        return
    # A projection that comes whole is asked once.
    product = part.query.projection(rows)
    del rows
    if hidden is not None:
        hidden.write_of(product, made[:, -hidden.width :])
    for columns, into in zip(part.columns, (queries, *shared.split(width, dim=1)), strict=True):
        into.copy_(product[:, columns.first + begin : columns.first + begin + width])
