"""The attention half of a block with q, k and v of one group of heads at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .cuts import QUERY_GROUPS, chunks, head_groups
from .rows import Modulation, Projection, RowsFn, clamp_fp16_

# Norm and rotary embedding of q or k rows: ([T, heads, head_dim], token of the first row) -> the
# same layout.
RotateFn = Callable[[torch.Tensor, int], torch.Tensor]
# q [1, heads, T, head_dim] and k, v [1, heads, S, head_dim] -> [1, T, heads * head_dim].
AttendFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Heads(NamedTuple):
    """Head counts of an attention layer: query heads, key/value heads, channels per head."""

    query: int
    key_value: int
    channels: int


def add_attention(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    norm_in: RowsFn,
    scale: Modulation,
    qkv: Projection,
    rotate_query: RotateFn,
    rotate_key: RotateFn,
    attend: AttendFn,
    out: Projection,
    norm_out: RowsFn,
    gate: Modulation,
    heads: Heads,
    groups: int,
    chunk_tokens: int,
    scratch: torch.Tensor | None = None,
) -> None:
    """target = source + gate * norm_out(out(attended)), attended from q, k, v of norm_in(source).

    For each group of heads: k and v of all tokens, then q chunk by chunk (from QUERY_GROUPS groups
    on: q, k and v of all tokens, then the attention chunk by chunk). The results of earlier groups
    wait in one buffer (`scratch`, if given). Those of the last group go straight through the output
    projection and need no buffer. Where qkv `is_whole` there is one group, and q, k and v come from
    one call per chunk.

    Source: the host's JointTransformerBlock and JointAttention (comfy/ldm/lumina/model.py).

    Args:
        source: residual stream, [T, D], float; read only unless it is `target`.
        target: [T, D], float; may be `source`.
        norm_in: RMS norm of rows, [T, D] -> new [T, D].
        scale: factors of the normed rows.
        qkv: D -> (query + 2 key_value) * channels, in that order.
        rotate_query: norm and rotary embedding of q.
        rotate_key: the same of k.
        attend: attention of a chunk of queries to all keys.
        out: query * channels -> D.
        norm_out: RMS norm of the result.
        gate: factors of the normed result.
        heads: head counts.
        groups: into how many groups the heads are cut, >= 1; 1 holds k and v of all heads.
        chunk_tokens: rows at a time, >= 1; a multiple of 64 keeps the CPU's attention bit-exact.
        scratch: [T, D] to overwrite, for what waits or else for q; may be a target that is not the
            source, as each row is read before the result is written there. None: a buffer is made
            where needed.

    Raises:
        ValueError: groups or chunk_tokens < 1.

    Memory: with S the tokens and G the groups, where G divides the heads and query heads share no
        k and v: S * D * (1 + 1 / G) + chunk_tokens * D * max(2, 1 + 2 / G) elements, and what
        `attend` holds beside its result; with `scratch` S * D * (1 - 1 / G) elements less; from
        QUERY_GROUPS groups on S * D / G more. Where qkv `is_whole`: (3 S + 4 chunk_tokens) * D.
    Exact: bit-exact on CPU.
    """
    tokens = source.shape[0]
    spans = head_groups(heads.key_value, 1 if qkv.is_whole else groups)
    repeats = heads.query // heads.key_value
    width = heads.query * heads.channels
    key_begin = width
    value_begin = width + heads.key_value * heads.channels

    def modulated(start: int, stop: int) -> torch.Tensor:
        return scale.multiply_(norm_in(source[start:stop]), start)

    def by_head(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(rows.shape[0], -1, heads.channels)

    holds_query = qkv.is_whole or len(spans) >= QUERY_GROUPS
    # [T, query heads before the last group's]
    held_width = spans[-1][0] * repeats * heads.channels
    held = None
    if held_width:
        held = source.new_empty(tokens, held_width) if scratch is None else scratch
    for first, last in spans:
        columns = (first * heads.channels, last * heads.channels)
        key = source.new_empty(tokens, last - first, heads.channels)
        value = source.new_empty(tokens, last - first, heads.channels)
        begin, end = columns[0] * repeats, columns[1] * repeats
        queries = None
        if holds_query:
            is_free = scratch is not None and held is None
            queries = scratch if is_free else source.new_empty(tokens, end - begin)
        for start, stop in chunks(tokens, chunk_tokens):
            projected = qkv.columns(modulated(start, stop))
            part = by_head(projected(key_begin + columns[0], key_begin + columns[1]))
            key[start:stop] = rotate_key(part, start)
            del part  # before the next rows are made
            if queries is not None:
                part = by_head(projected(begin, end))
                by_head(queries[start:stop]).copy_(rotate_query(part, start))
                del part
            part = projected(value_begin + columns[0], value_begin + columns[1])
            del projected
            value[start:stop] = by_head(part)
            del part
        key = _as_attended(key, repeats)  # k without repeats is gone before v's are made
        value = _as_attended(value, repeats)
        for start, stop in chunks(tokens, chunk_tokens):
            if queries is not None:
                query = by_head(queries[start:stop])
            else:
                rows = modulated(start, stop)
                query = by_head(qkv(rows, begin, end))
                del rows  # before q is rotated
                query = rotate_query(query, start)
            # [T, H, C] -> [1, H, T, C]
            attended = attend(query.movedim(0, 1)[None], key, value)[0]
            del query
            if end < width:
                assert held is not None
                held[start:stop, begin:end] = attended
                del attended
                continue
            if held is not None:
                joined = source.new_empty(stop - start, width)
                joined[:, :begin] = held[start:stop, :begin]
                joined[:, begin:] = attended
                attended = joined
                del joined
            change = clamp_fp16_(out(attended))
            del attended
            change = gate.multiply_(norm_out(change), start)
            torch.add(source[start:stop], change, out=target[start:stop])
            del change
        del key, value, queries  # before the next group's are made


def _as_attended(rows: torch.Tensor, repeats: int) -> torch.Tensor:
    """[T, H, C] -> [1, H * repeats, T, C]; a copy only where queries share key/value heads."""
    if repeats > 1:
        rows = rows.repeat_interleave(repeats, dim=1)
    return rows.movedim(0, 1)[None]
