"""The linear layers of the host's transformer, each fetched at its first use."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import comfy.ops
import torch

from ...denoiser.rows import ColumnsFn, Projection, columns_of
from ..base.fetch import fetch_weights, is_plain


def projection(layer: Any, like: torch.Tensor, until: ExitStack) -> Projection:
    """The layer as a projection. Arguments as `fetch_weights`.

    Memory: from the first use to the projection's end what `fetch_weights` says.
    """

    def columns() -> ColumnsFn:
        return columns_of(*fetch_weights(layer, like, until))

    def whole() -> ColumnsFn:
        return lambda rows, first, last: layer(rows)[:, first:last]

    if is_plain(layer, comfy.ops.disable_weight_init.Linear):
        return Projection(columns)
    return Projection(whole, is_whole=True)
