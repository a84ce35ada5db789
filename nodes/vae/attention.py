"""The attention of the smallest map with itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch.nn import functional

from ..cuts import pieces
from .cuts import query_rows
from .layers import AttentionWeights, Fetch

# Called after each strip with its share of the map that is read; may raise to end the work.
Tick = Callable[[float], None]


def attended_(
    parts: list[torch.Tensor],
    norm: Callable[[torch.Tensor], torch.Tensor],
    layers: AttentionWeights,
    until: ExitStack,
    tick: Tick,
) -> torch.Tensor:
    """Adds to a map the attention over its norm, in place if it is one strip; empties the list.

    Args:
        parts: the map's strips, [1, C, n, W], float.
        norm: gives the normed rows.
        until: borrows weights until it closes.

    Memory: 4 maps: itself, normed, keys and values; and 3 parts for the queries at work.
    """
    rows = parts.pop() if len(parts) == 1 else torch.cat(parts, 2)
    parts.clear()
    rows = rows.contiguous(memory_format=torch.channels_last)
    # [1, C, H, W] -> [H * W, C], a view
    flat = rows.permute(0, 2, 3, 1).flatten(0, 2)
    tokens = flat.shape[0]
    normed = norm(rows).permute(0, 2, 3, 1).flatten(0, 2)
    query, key, value, out = (
        _linear(fetch, until) for fetch in (layers.query, layers.key, layers.value, layers.out)
    )
    keys, values = key(normed)[None, None], value(normed)[None, None]
    part = min(query_rows(tokens), layers.most_queries(keys))
    for start, stop in pieces(tokens, part):
        made = layers.attend(query(normed[start:stop])[None, None], keys, values)
        flat[start:stop].add_(out(made[0, 0]))
        tick((stop - start) / tokens)
    return rows


def _linear(fetch: Fetch, until: ExitStack) -> Callable[[torch.Tensor], torch.Tensor]:
    """A 1 x 1 convolution as a product of rows [T, C_in]."""
    weight, bias = fetch(until)
    return lambda rows: functional.linear(rows, weight.flatten(1), bias)
