"""The attention half of a block with q, k and v of one group of heads at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .cuts import DenoiserPlan, chunks, joined
from .rows import Modulation, Projection, RowsFn, clamp_fp16_

# Norm and rotary embedding in place: of q rows, k rows or both, each [T, heads, head_dim] with any
# stride between rows and contiguous heads; and the token of the first row.
RotateFn = Callable[["torch.Tensor | None", "torch.Tensor | None", int], None]
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
    rotate: RotateFn,
    attend: AttendFn,
    out: Projection,
    norm_out: RowsFn,
    gate: Modulation,
    heads: Heads,
    plan: DenoiserPlan,
    scratch: torch.Tensor | None = None,
) -> None:
    """target = source + gate * norm_out(out(attended)), attended from q, k, v of norm_in(source).

    For each group of heads: k and v of all tokens, and q if `holds_query`, side by side in one
    buffer; then the attention chunk by chunk, with q made there if it is not held. The results of
    earlier groups wait in one more buffer (`scratch`, if given). Those of the last group go
    straight through the output projection and need no buffer. Where qkv `is_whole` there is one
    group and q is held, so that each chunk takes one call.

    Source: the host's JointTransformerBlock and JointAttention (comfy/ldm/lumina/model.py).

    Args:
        source: residual stream, [T, D], float; read only unless it is `target`.
        target: [T, D], float; may be `source`.
        norm_in: RMS norm of rows, [T, D] -> new [T, D].
        scale: factors of the normed rows.
        qkv: D -> (query + 2 key_value) * channels, in that order.
        rotate: norm and rotary embedding of q and k, in place.
        attend: attention of a chunk of queries to all keys.
        out: query * channels -> D.
        norm_out: RMS norm of the result.
        gate: factors of the normed result.
        heads: head counts.
        plan: its groups, chunk_tokens and holds_query; a multiple of 64 tokens keeps the CPU's
            attention bit-exact.
        scratch: [T, D] to overwrite, for what waits; may be a target that is not the source, as
            each row is read before the result is written there. None: a buffer is made if needed.

    Raises:
        ValueError: groups or chunk_tokens < 1.

    Memory: with S the tokens and G the groups, where G divides the heads and query heads share no
        k and v: S * D * (1 + 1 / G) + 2 * chunk_tokens * D elements, and what `attend` holds beside
        its result; with `holds_query` S * D / G more; with `scratch` S * D * (1 - 1 / G) less.
    Exact: bit-exact on CPU.
    """
    tokens = source.shape[0]
    cut = plan.attention(heads.key_value, is_whole=qkv.is_whole)
    repeats = heads.query // heads.key_value
    width = heads.query * heads.channels
    runs = chunks(tokens, cut.made_tokens)

    def modulated(start: int, stop: int) -> torch.Tensor:
        return scale.multiply_(norm_in(source[start:stop]), start)

    def by_head(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(rows.shape[0], -1, heads.channels)

    # [T, query heads before the last group's]
    held_width = cut.spans[-1][0] * repeats * heads.channels
    held = None
    if held_width:
        held = source.new_empty(tokens, held_width) if scratch is None else scratch
    for first, last in cut.spans:
        begin, end = (head * repeats * heads.channels for head in (first, last))
        columns = [(begin, end)] if cut.holds_query else []
        for at in (heads.query, heads.query + heads.key_value):
            columns.append(((at + first) * heads.channels, (at + last) * heads.channels))
        widths = [stop - start for start, stop in columns]
        if qkv.is_whole and qkv.is_own and len(runs) == 1:
            buffer = qkv(modulated(0, tokens))
        else:
            buffer = source.new_empty(tokens, sum(widths))
            for start, stop in runs:
                qkv.write(modulated(start, stop), joined(columns), buffer[start:stop])
        *queries, key, value = (by_head(part) for part in buffer.split(widths, dim=1))
        del buffer  # where k and v are copied, it is gone
        rotate(queries[0] if queries else None, key, 0)
        key, value = _as_attended(key, repeats), _as_attended(value, repeats)
        for start, stop in chunks(tokens, cut.earlier_tokens if end < width else cut.last_tokens):
            if queries:
                query = queries[0][start:stop]
            else:
                query = by_head(qkv(modulated(start, stop), begin, end))
                rotate(query, None, start)
            # [T, H, C] -> [1, H, T, C]
            attended = attend(query.movedim(0, 1)[None], key, value)[0]
            del query
            if end < width:
                assert held is not None
                held[start:stop, begin:end] = attended
                del attended
                continue
            if held is not None:
                whole = source.new_empty(stop - start, width)
                whole[:, :begin] = held[start:stop, :begin]
                whole[:, begin:] = attended
                attended = whole
                del whole
            change = clamp_fp16_(out(attended))
            del attended
            change = gate.multiply_(norm_out(change), start)
            torch.add(source[start:stop], change, out=target[start:stop])
            del change
        del queries, key, value  # before the next group's are made


def _as_attended(rows: torch.Tensor, repeats: int) -> torch.Tensor:
    """[T, H, C] -> [1, H * repeats, T, C]; a copy only where queries share key/value heads."""
    if repeats > 1:
        rows = rows.repeat_interleave(repeats, dim=1)
    return rows.movedim(0, 1)[None]
