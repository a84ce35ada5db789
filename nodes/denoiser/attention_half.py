"""The attention half of a block with q, k and v of one group of heads at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from .attention_part import Heads, Part, RotateFn
from .cuts import DenoiserPlan, chunks
from .rows import Columns, Modulation, Projection, RowsFn, clamp_fp16_, write_columns

# q [1, heads, T, head_dim] and k, v [1, heads, S, head_dim] -> [1, T, heads * head_dim].
AttendFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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

    def modulated(start: int, stop: int) -> torch.Tensor:
        return scale.multiply_(norm_in(source[start:stop]), start)

    def add(change: torch.Tensor, start: int) -> None:
        change = gate.multiply_(norm_out(change), start)
        stop = start + change.shape[0]
        torch.add(source[start:stop], change, out=target[start:stop])

    shared = heads.query * heads.channels, (heads.query + heads.key_value) * heads.channels
    part = Part(
        source,
        modulated,
        Columns(qkv),
        Columns(qkv, shared[0]),
        Columns(qkv, shared[1]),
        rotate,
        out=lambda attended, start: clamp_fp16_(out(attended)),
        add=add,
        scratch=scratch,
        is_packed=True,
    )
    add_joint_attention([part], attend=attend, heads=heads, plan=plan)


def add_joint_attention(
    parts: Sequence[Part], *, attend: AttendFn, heads: Heads, plan: DenoiserPlan
) -> None:
    """Attention over the tokens of all parts, whose results each part adds to its own stream.

    As `add_attention`, which has one part. Chunks of queries run over the joined sequence.

    Args:
        parts: in the order of the sequence.
        attend, heads, plan: see `add_attention`.

    Memory: as `add_attention`, with S the tokens of all parts.
    Exact: bit-exact on CPU.
    """
    begins = [0, *itertools.accumulate(part.source.shape[0] for part in parts)]
    tokens, like = begins.pop(), parts[0].source
    is_whole = any(columns.projection.is_whole for part in parts for columns in part.columns)
    norms_across = parts[0].norms is not None
    cut = plan.attention(heads.key_value, is_whole=is_whole, norms_across=norms_across)
    repeats = heads.query // heads.key_value
    width = heads.query * heads.channels

    def by_head(rows: torch.Tensor) -> torch.Tensor:
        return rows.view(rows.shape[0], -1, heads.channels)

    # [T, query heads before the last group's]
    held_width = cut.spans[-1][0] * repeats * heads.channels
    held = [part.waiting(held_width) for part in parts] if held_width else []
    for first, last in cut.spans:
        begin, end = (head * repeats * heads.channels for head in (first, last))
        shared = (first * heads.channels, last * heads.channels)
        columns = [(0, begin, end)] if cut.holds_query else []
        columns += [(1, *shared), (2, *shared)]
        widths = [stop - start for _, start, stop in columns]
        runs = [chunks(part.source.shape[0], cut.made_tokens) for part in parts]
        if cut.keeps_rows:
            part, *made = parts[0].with_kept_rows(cut.made_tokens)
            parts = [part]
        elif len(parts) == len(runs[0]) == 1 and parts[0].gives_buffer:
            buffer = parts[0].query.projection(parts[0].modulated(0, tokens))
            made = list(buffer.split(widths, dim=1))
            del buffer  # where k and v are copied, it is gone
        else:
            buffer = like.new_empty(tokens, sum(widths))
            for part, at, of_part in zip(parts, begins, runs, strict=True):
                for start, stop in of_part:
                    part.write(start, stop, columns, buffer[at + start : at + stop])
            made = list(buffer.split(widths, dim=1))
            del buffer
        *queries, key, value = map(by_head, made)
        del made
        for part, at in zip(parts, begins, strict=True):
            here = slice(at, at + part.source.shape[0])
            part.rotate(queries[0][here] if queries else None, key[here], 0)
        key, value = _as_attended(key, repeats), _as_attended(value, repeats)
        for start, stop in chunks(tokens, cut.earlier_tokens if end < width else cut.last_tokens):
            here = list(_overlaps(parts, begins, start, stop))
            if queries:
                query = queries[0][start:stop]
            else:
                query = by_head(_made_queries(parts, here, begin, end))
                for index, low, high, at in here:
                    parts[index].rotate(query[at : at + high - low], None, low)
            # [T, H, C] -> [1, H, T, C]
            attended = attend(query.movedim(0, 1)[None], key, value)[0]
            del query
            if end < width:
                for index, low, high, at in here:
                    held[index][low:high, begin:end] = attended[at : at + high - low]
                del attended
                continue
            if held:
                whole = like.new_empty(stop - start, width)
                for index, low, high, at in here:
                    whole[at : at + high - low, :begin] = held[index][low:high, :begin]
                whole[:, begin:] = attended
                attended = whole
                del whole
            results = [attended[at : at + high - low] for _, low, high, at in here]
            del attended  # each part's goes before its change is added
            for index, low, _, _ in here:
                change = parts[index].out(results.pop(0), low)
                parts[index].add(change, low)
                del change
        del queries, key, value  # before the next group's are made


def _overlaps(
    parts: Sequence[Part], begins: Sequence[int], start: int, stop: int
) -> Iterator[tuple[int, int, int, int]]:
    """Where a run of the joined sequence lies: number of a part, its rows, and the run's first."""
    for index, (part, begin) in enumerate(zip(parts, begins, strict=True)):
        low, high = max(start, begin), min(stop, begin + part.source.shape[0])
        if low < high:
            yield index, low - begin, high - begin, low - start


def _made_queries(
    parts: Sequence[Part], here: Sequence[tuple[int, int, int, int]], begin: int, end: int
) -> torch.Tensor:
    """q of a run of the joined sequence, [T, end - begin]."""
    if len(here) == 1:
        ((index, low, high, _),) = here
        return parts[index].made_queries(low, high, begin, end)
    made = parts[0].source.new_empty(sum(high - low for _, low, high, _ in here), end - begin)
    for index, low, high, at in here:
        part = parts[index]
        rows = made[at : at + high - low]
        write_columns(part.modulated(low, high), [(part.query, begin, end)], rows)
    return made


def _as_attended(rows: torch.Tensor, repeats: int) -> torch.Tensor:
    """[T, H, C] -> [1, H * repeats, T, C]; a copy only where queries share key/value heads."""
    if repeats > 1:
        rows = rows.repeat_interleave(repeats, dim=1)
    return rows.movedim(0, 1)[None]
