"""The linear layers of the host's transformer, each fetched once, at its first use."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import comfy.ops
import torch

from ...denoiser.rows import ColumnsFn, Projection, columns_of
from ..base.fetch import (
    fetch_quantised,
    fetch_weights,
    has_forward_of,
    is_mixed,
    is_plain,
    multiplies_quantised,
)


def projection(layer: Any, like: torch.Tensor, until: ExitStack) -> Projection:
    """The layer as a projection. Arguments as `fetch_weights`.

    A layer that is not the host's, or whose forward was replaced, is called for each chunk.

    Memory: from the first use to the projection's end what `fetch_weights` or `fetch_quantised`
        says.
    """

    def columns() -> ColumnsFn:
        return columns_of(*fetch_weights(layer, like, until))

    def whole() -> ColumnsFn:
        multiply = fetch_quantised(layer, like, until) if _is_fetched(layer) else layer
        return lambda rows, first, last, into: multiply(rows)[:, first:last]

    if not is_whole(layer):
        return Projection(columns)
    # A hook on another layer may keep its result.
    return Projection(whole, is_whole=True, is_own=_is_fetched(layer))


def is_whole(layer: Any) -> bool:
    """True where each call of the layer computes all output features."""
    if is_plain(layer, comfy.ops.disable_weight_init.Linear):
        return False
    # The layer smooths its rows before it multiplies.
    is_smoothed = layer._parameters.get("pre_quant_scale") is not None
    return not _is_hosts(layer) or is_smoothed or multiplies_quantised(layer)


def has_whole(parts: Iterable[Any]) -> bool:
    """True where a linear layer of the parts `is_whole`. Quantised ones are no nn.Linear."""
    modules = (module for part in parts for module in part.modules())
    return any(is_whole(module) for module in modules if hasattr(module, "in_features"))


def is_fetched_once(layer: Any) -> bool:
    """True where one fetch of the weight serves all chunks of a block."""
    return not is_whole(layer) or _is_fetched(layer)


def _is_fetched(layer: Any) -> bool:
    return _is_hosts(layer) and multiplies_quantised(layer)


def _is_hosts(layer: Any) -> bool:
    """True for a layer of the host's quantised classes with its own forward."""
    is_known = is_mixed(layer) or type(layer) is comfy.ops.fp8_ops.Linear
    return is_known and has_forward_of(layer, type(layer))
