"""The linear layers of the host's transformer, each fetched once, at its first use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.ops
import torch

from ...denoiser.cuts import DenoiserPlan
from ...denoiser.rows import ColumnsFn, Projection, columns_of
from ...denoiser.sizes import TransformerSizes
from ..base.fetch import fetch_quantised, fetch_weights, is_plain, multiplies_quantised
from .stored import (
    is_hosts,
    made,
    makes_columns,
    multiplied,
    multiplies_columns,
    row_bits,
)


class Stored(NamedTuple):
    """How layers multiply by weights in fewer bits; see `TransformerSizes`."""

    is_whole: bool
    is_quantised: bool
    row_bits: int
    is_copied: bool

    @classmethod
    def of(cls, modules: Iterable[Any]) -> Stored:
        """Of the linear layers among them, each of which `cut_projection` is given."""
        layers = list(_linear(modules))
        multiplying = [layer for layer in layers if multiplies_columns(layer)]
        copying = [layer for layer in layers if makes_columns(layer)]
        whole = [x for x in {*layers}.difference(multiplying, copying) if is_whole(x)]
        return cls(
            is_whole=bool(whole),
            is_quantised=bool(multiplying),
            row_bits=max(map(row_bits, multiplying), default=0),
            is_copied=bool(copying) or any(map(copies_whole, whole)),
        )


def as_stored(sizes: TransformerSizes, denoiser: Any, modules: Collection[Any]) -> TransformerSizes:
    """The sizes of a model whose linear layers among these are given to `cut_projection`."""
    stored = Stored.of(modules)
    return replace(
        sizes,
        is_whole=stored.is_whole,
        is_quantised=stored.is_quantised,
        row_bits=stored.row_bits,
        is_copied=stored.is_copied,
        host_copy=largest_copy(set(denoiser.modules()).difference(modules)),
    )


def cut_projection(
    layer: Any, like: torch.Tensor, until: ExitStack, plan: DenoiserPlan
) -> Projection:
    """As `projection`, which computes of a quantised layer only the columns that are asked for.

    Args:
        plan: its copy_elements.

    Memory: as `projection`; see also `multiplied` and `made`.
    """
    if multiplies_columns(layer):
        return Projection(lambda: multiplied(layer, like, until), is_direct=False)
    if makes_columns(layer):
        return Projection(lambda: made(layer, like, until, plan.copy_elements))
    return projection(layer, like, until)


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


def largest_copy(modules: Iterable[Any]) -> int:
    """Elements of the largest weight that is copied where linear layers among them are called."""
    copying = (layer for layer in _linear(modules) if makes_columns(layer) or copies_whole(layer))
    return max((layer.in_features * layer.out_features for layer in copying), default=0)


def is_whole(layer: Any) -> bool:
    """True where each call of the layer computes all output features."""
    if is_plain(layer, comfy.ops.disable_weight_init.Linear):
        return False
    # The layer smooths its rows before it multiplies.
    is_smoothed = layer._parameters.get("pre_quant_scale") is not None
    return not is_hosts(layer) or is_smoothed or multiplies_quantised(layer)


def has_whole(parts: Iterable[Any]) -> bool:
    """True where a linear layer of the parts `is_whole`."""
    return any(map(is_whole, _linear(module for part in parts for module in part.modules())))


def is_fetched_once(layer: Any) -> bool:
    """True where one fetch of the weight serves all chunks of a block."""
    return not is_whole(layer) or _is_fetched(layer)


def _is_fetched(layer: Any) -> bool:
    return is_hosts(layer) and multiplies_quantised(layer)


def copies_whole(layer: Any) -> bool:
    """True for a layer of another pack whose weight is stored in bytes, as of GGUF files."""
    weight = getattr(layer, "weight", None)
    if not hasattr(layer, "in_features") or not isinstance(weight, torch.Tensor):
        return False
    return weight.dtype.itemsize == 1 and not is_hosts(layer) and is_whole(layer)


def _linear(modules: Iterable[Any]) -> Iterator[Any]:
    """The linear layers. Quantised ones are no nn.Linear."""
    return (module for module in modules if hasattr(module, "in_features"))
