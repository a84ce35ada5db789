"""Attention a few heads, or a few queries, at a time: scores exist for one slice only."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..cuts import pieces
from .budget import Geometry, Slices

# (query, key, value, mask, heads) of one slice, in the caller's layout -> that slice's result.
AttendFn = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", int], torch.Tensor
]


def geometry(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    heads: int,
    skip_reshape: bool = False,
    enable_gqa: bool = False,
) -> Geometry:
    """Returns the sizes of an attention call; arguments as `sliced_attention`.

    Raises:
        ValueError: the tensors do not fit one another or `heads`.
    """
    shapes = f"got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}, heads {heads}"
    axes = 4 if skip_reshape else 3
    if heads < 1 or not query.ndim == key.ndim == value.ndim == axes:
        raise ValueError(f"query, key and value must have {axes} axes and heads be >= 1, {shapes}")
    if skip_reshape:
        channels, kv_heads = query.shape[-1], key.shape[1]
        fits = query.shape[1] == heads and key.shape[-1] == channels and value.shape[1] == kv_heads
    else:
        channels = query.shape[-1] // heads
        kv_heads = key.shape[-1] // max(channels, 1)
        fits = query.shape[-1] == heads * channels
        fits = fits and key.shape[-1] == value.shape[-1] == kv_heads * channels
    fits = fits and key.shape[-2] == value.shape[-2] and kv_heads > 0
    if not fits or heads % kv_heads or (kv_heads != heads and not enable_gqa):
        raise ValueError(f"query, key and value must fit one another and heads, {shapes}")
    shape = Geometry(query.shape[0], heads, kv_heads, query.shape[-2], key.shape[-2], channels)
    _check_mask(mask, shape)
    return shape


def sliced_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    attend: AttendFn,
    heads: int,
    slices: Slices,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Returns what `attend` returns for the whole call, calling it for one slice after the other.

    Heads are independent of one another, and so are queries. Where query heads share keys and
    values, `slices.heads` is rounded down so that no slice needs parts of two groups.

    Args:
        query: [B, T, H * D], or [B, H, T, D] with skip_reshape, float.
        key: [B, S, Hk * D], or [B, Hk, S, D], float.
        value: [B, S, Hk * D], or [B, Hk, S, Dv], float.
        mask: None, or [T, S], [B, T, S] or [B, H, T, S] with sizes of 1 allowed, any dtype.
        attend: called with views of the four and the slice's number of heads.
        heads: H.
        slices: heads and queries of a slice, each >= 1; larger ones mean all.
        skip_reshape: layout of query, key and value.
        skip_output_reshape: `attend` returns [B, h, t, Dv] instead of [B, t, h * D].
        enable_gqa: Hk may be a divisor of H; else it is H.

    Returns:
        [B, T, H * D], or [B, H, T, Dv] with skip_output_reshape; in the dtype that `attend` gave,
        and in memory head by head or token by token as its slices are.

    Raises:
        ValueError: tensors that do not fit one another, slices < 1, or a result of another shape.

    Memory: the result + one slice's result + what `attend` holds for one slice.
    Exact: bit-exact if `attend` computes a head, or a row of queries, independently of the others.
        The CPU's attention kernel does so for heads. For queries it does at 128 channels, T a
        multiple of 32 and slices of a multiple of 64. Elsewhere a short slice may get other blocks:
        measured up to 5e-5 relative in bfloat16, 4e-8 in float32.
    """
    shape = geometry(
        query, key, value, mask, heads=heads, skip_reshape=skip_reshape, enable_gqa=enable_gqa
    )
    if slices.heads < 1 or slices.queries < 1:
        raise ValueError(f"slices must be >= 1, got {slices.heads} heads, {slices.queries} queries")
    head_spans = _head_spans(shape, slices.heads)
    query_spans = pieces(shape.queries, slices.queries)
    if len(head_spans) * len(query_spans) <= 1:
        return attend(query, key, value, mask, heads)
    shared = shape.heads // shape.kv_heads
    # Where one head leaves it open, the result lies in memory as the query does.
    by_token = not (skip_reshape and query.is_contiguous())
    out: torch.Tensor | None = None
    for first, last in head_spans:
        kv_first, kv_last = first // shared, (last - 1) // shared + 1
        keys = _cut_heads(key, kv_first, kv_last, shape.channels, skip_reshape)
        values = _cut_heads(value, kv_first, kv_last, shape.channels, skip_reshape)
        rows = _cut_heads(query, first, last, shape.channels, skip_reshape)
        for start, stop in query_spans:
            part = attend(
                rows[..., start:stop, :],
                keys,
                values,
                _cut_mask(mask, (first, last), (start, stop)),
                last - first,
            )
            _check_part(part, shape, last - first, stop - start, is_split=skip_output_reshape)
            if out is None:
                out = _empty(part, shape, is_split=skip_output_reshape, by_token=by_token)
            place = _cut_heads(out, first, last, shape.channels, skip_output_reshape)
            place[..., start:stop, :] = part
            del part  # before the next slice is computed
    assert out is not None
    return out


def _head_spans(shape: Geometry, size: int) -> list[tuple[int, int]]:
    """Runs of heads that hold whole groups of sharing heads, or lie within one."""
    shared = shape.heads // shape.kv_heads
    if size >= shared:
        return pieces(shape.heads, size // shared * shared)
    groups = range(0, shape.heads, shared)
    return [(base + a, base + b) for base in groups for a, b in pieces(shared, size)]


def _cut_heads(
    tensor: torch.Tensor, first: int, last: int, channels: int, is_split: bool
) -> torch.Tensor:
    if is_split:
        return tensor[:, first:last]
    return tensor[..., first * channels : last * channels]


def _check_mask(mask: torch.Tensor | None, shape: Geometry) -> None:
    if mask is None:
        return
    wanted = (shape.batch, shape.heads, shape.queries)
    allowed = {2: wanted[2:], 3: (wanted[0], wanted[2]), 4: wanted}.get(mask.ndim)
    if allowed is None or any(
        n not in (1, m) for n, m in zip(mask.shape[:-1], allowed, strict=True)
    ):
        raise ValueError(
            f"mask must be [T, S], [B, T, S] or [B, H, T, S] with B, H, T = {wanted} or 1, "
            f"got {tuple(mask.shape)}"
        )


def _cut_mask(
    mask: torch.Tensor | None, heads: tuple[int, int], queries: tuple[int, int]
) -> torch.Tensor | None:
    """The mask of a slice; an axis of size 1 serves every slice."""
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[1] > 1:
        mask = mask[:, slice(*heads)]
    if mask.shape[-2] > 1:
        mask = mask[..., slice(*queries), :]
    return mask


def _check_part(
    part: torch.Tensor, shape: Geometry, heads: int, queries: int, *, is_split: bool
) -> None:
    if is_split:
        fits = part.ndim == 4 and part.shape[:3] == (shape.batch, heads, queries)
    else:
        fits = part.shape == (shape.batch, queries, heads * shape.channels)
    if not fits:
        raise ValueError(
            f"attend must return {heads} heads and {queries} queries of {shape.batch} samples, "
            f"got {tuple(part.shape)}"
        )


def _empty(part: torch.Tensor, shape: Geometry, *, is_split: bool, by_token: bool) -> torch.Tensor:
    """The whole result, to be filled; its first slice decides dtype and layout."""
    batch, heads, width = shape.batch, shape.heads, part.shape[-1]
    if not is_split:
        return part.new_empty(batch, shape.queries, heads * shape.channels)
    if part.is_contiguous() != part.transpose(1, 2).is_contiguous():
        by_token = not part.is_contiguous()
    if by_token:  # then the caller's next reshape copies nothing
        return part.new_empty(batch, shape.queries, heads, width).transpose(1, 2)
    return part.new_empty(batch, heads, shape.queries, width)
