"""Some output features of a layer whose weight is stored in fewer bits than its rows have.

A row of the weight is an output feature, so a product with some of the rows needs no others. The
rows stay as stored: their scales are those of the whole weight, or are cut with them.
"""

from __future__ import annotations

import copy
import functools
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ...cuts import pieces
from ...denoiser.products import columns_at_a_time
from ...denoiser.rows import ColumnsFn, columns_of
from ..base.fetch import (
    fetch_quantised,
    fetch_stored,
    has_forward_of,
    is_mixed,
    is_plain,
    multiplies_quantised,
)


class _Format(NamedTuple):
    """Of the host's QUANT_ALGOS.

    border: rows of the weight begin at multiples of this, where scales of blocks lie in tiles.
    row_bits: of an element of a layer's rows, as the layer quantises them before the product; 0
        where the product does so.
    """

    border: int
    row_bits: int


_FORMATS = {
    "float8_e4m3fn": _Format(1, 8),
    "float8_e5m2": _Format(1, 8),
    "int8_tensorwise": _Format(1, 0),
    "mxfp8": _Format(128, 8),
    "nvfp4": _Format(128, 4),
}
_PLAIN_FP8 = _Format(1, 8)


def multiplies_columns(layer: Any) -> bool:
    """True where the host's own forward can multiply by some rows of the weight as stored."""
    return is_hosts(layer) and multiplies_quantised(layer) and _format_of(layer) is not None


def makes_columns(layer: Any) -> bool:
    """True where the host multiplies by a copy of the weight in the rows' dtype.

    Where LoRA changes the weight, the copy is changed too, so that it is made once.
    """
    if layer.weight is None or _is_changed(layer):
        return False
    if is_plain(layer, comfy.ops.disable_weight_init.Linear):
        return layer.weight.dtype.itemsize == 1
    if not is_hosts(layer) or layer._parameters.get("pre_quant_scale") is not None:
        return False
    is_known = isinstance(layer.weight, QuantizedTensor) and _format_of(layer) is not None
    return is_known and not multiplies_quantised(layer)


def is_hosts(layer: Any) -> bool:
    """True for a layer of the host's quantised classes with its own forward."""
    is_known = is_mixed(layer) or type(layer) is comfy.ops.fp8_ops.Linear
    return is_known and has_forward_of(layer, type(layer))


def row_bits(layer: Any) -> int:
    """Bits of an element of the rows as a layer that `multiplies_columns` quantises them."""
    found = _format_of(layer)
    return 0 if found is None else found.row_bits


def multiplied(layer: Any, like: torch.Tensor, until: ExitStack) -> ColumnsFn:
    """Columns of what the host's own forward makes of rows. Arguments as `fetch_weights`.

    Memory: a product that is written elsewhere is beside it; and the rows as the layer quantises
        them.
    Exact: bit-exact on CPU, as an output feature does not depend on the others.
    """
    found = _format_of(layer)
    if found is None:
        raise ValueError(f"the layer's format must be one of {', '.join(_FORMATS)}")
    whole, count = fetch_quantised(layer, like, until), layer.out_features

    @functools.cache
    def part(first: int, last: int) -> Any:
        cut = copy.copy(whole)
        bias = whole._parameters.get("bias")
        cut._parameters = {
            **whole._parameters,
            "weight": _rows_of(whole, whole.weight, first, last),
            "bias": None if bias is None else bias[first:last],
        }
        return cut

    def multiply(
        rows: torch.Tensor, first: int, last: int | None, into: torch.Tensor | None
    ) -> torch.Tensor:
        stop = count if last is None else last
        low, high = _bordered(first, stop, found.border, count)
        product = part(low, high)(rows)
        if (low, high) != (first, stop):
            product = product[:, first - low : stop - low]
        return product if into is None else into.copy_(product)

    return multiply


def made(layer: Any, like: torch.Tensor, until: ExitStack, copy_elements: int) -> ColumnsFn:
    """Columns of rows times copies of the weight's rows. Other arguments as `fetch_weights`.

    Args:
        copy_elements: of the copy that lives at a time; at least some columns are made.

    Memory: that copy; in the buffers of `fetch_weights`, the weight as stored.
    Exact: bit-exact on CPU.
    """
    weight, bias = fetch_stored(layer, like, until)
    found = _format_of(layer) if isinstance(weight, QuantizedTensor) else None
    border, count = 1 if found is None else found.border, layer.out_features
    step = columns_at_a_time(layer.in_features, copy_elements)

    def copied(first: int, last: int) -> torch.Tensor:
        if not isinstance(weight, QuantizedTensor):
            return weight[first:last].to(like.dtype)
        low, high = _bordered(first, last, border, count)
        part = _rows_of(layer, weight, low, high).to(like.dtype).dequantize()
        return part[first - low : last - low]

    def multiply(
        rows: torch.Tensor, first: int, last: int | None, into: torch.Tensor | None
    ) -> torch.Tensor:
        columns = (count if last is None else last) - first
        if into is None:
            into = rows.new_empty(rows.shape[0], columns)
        for begin, end in pieces(columns, step):
            low, high = first + begin, first + end
            of_part = None if bias is None else bias[low:high]
            columns_of(copied(low, high), of_part)(rows, 0, None, into[:, begin:end])
        return into

    return multiply


def _format_of(layer: Any) -> _Format | None:
    if isinstance(layer, comfy.ops.fp8_ops.Linear):
        return _PLAIN_FP8
    return _FORMATS.get(getattr(layer, "quant_format", None) or "")


def _is_changed(layer: Any) -> bool:
    """True where a LoRA, or another function, changes the weight or the bias at each use."""
    names = ("weight_function", "bias_function", "weight_lowvram_function", "bias_lowvram_function")
    return any(getattr(layer, name, None) for name in names)


def _bordered(first: int, last: int, border: int, count: int) -> tuple[int, int]:
    """The fewest rows between borders that hold first:last."""
    return first // border * border, min(count, -(-last // border) * border)


def _rows_of(layer: Any, weight: Any, first: int, last: int) -> torch.Tensor:
    """Rows of a layer's weight as views, from border to border.

    Scales of blocks lie in tiles of 128 rows, one after the other, so that those of whole tiles
    are a run of them.

    Source: to_blocked of comfy-kitchen's float_utils.py.
    """
    if not isinstance(weight, QuantizedTensor):
        return weight[first:last]
    count, width = weight.shape
    params, stop = weight.params, last if last < count else None  # the last ones are filled up
    data = weight.layout_cls.get_plain_tensors(weight)[0]
    of_blocks = "block_scale" if hasattr(params, "block_scale") else "scale"
    scales = getattr(params, of_blocks)
    cut = {of_blocks: scales[first:stop]} if scales.numel() > 1 else {}
    shape = (last - first, width)
    return QuantizedTensor(
        data[first:stop], layer.layout_type, replace(params, orig_shape=shape, **cut)
    )
