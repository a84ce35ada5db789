"""Fetches a layer's weight once, for code that then uses it for many chunks.

The host streams a weight from RAM (and applies LoRA, and casts fp8) at each call of a layer. A loop
that called the layer once per chunk would pay that once per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import comfy.ops
import torch
from comfy.cli_args import args
from torch.nn import functional

from ...cuts import pieces

RowsFn = Callable[[torch.Tensor], torch.Tensor]

_PIECE_ELEMENTS = 2**17
_PLAIN = comfy.ops.disable_weight_init


def is_plain(layer: Any, kind: type) -> bool:
    """True where the layer multiplies as torch does, after the host's cast.

    False for quantised layers, for layers of other packs and for layers whose forward was replaced.
    """
    # Of the layer, not of its class: a bypass LoRA sits on the layer alone.
    return (
        isinstance(layer, kind)
        and _function(layer.forward) is kind.forward
        and _function(layer.forward_comfy_cast_weights) is kind.forward_comfy_cast_weights
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(method, "__func__", method)


def fetch_norm(layer: Any, like: torch.Tensor, until: ExitStack) -> RowsFn:
    """Fetches the weight of an RMS norm; returns the norm of rows. Arguments as `fetch_weights`."""
    if not is_plain(layer, _PLAIN.RMSNorm):
        return layer
    weight, _ = fetch_weights(layer, like, until)
    return lambda rows: by_pieces(
        lambda part: functional.rms_norm(part, layer.normalized_shape, weight, layer.eps), rows
    )


def by_pieces(function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """Applies a row-wise function to rows [T, ...]; on the CPU a few rows at a time.

    The CPU has no fused norm and rotary embedding: their steps hold several float32 copies.

    Memory: the result; on the CPU also the copies of `_PIECE_ELEMENTS` elements.
    Exact: bit-exact, rows are independent.
    """
    tokens = rows[0].shape[0]
    piece = max(1, _PIECE_ELEMENTS // max(1, rows[0][:1].numel()))
    if rows[0].device.type != "cpu" or tokens <= piece:
        return function(*rows)
    result = torch.empty_like(rows[0])
    for first, last in pieces(tokens, piece):
        result[first:last] = function(*(r[first:last] for r in rows))
    return result


def fetch_weights(
    layer: Any, like: torch.Tensor, until: ExitStack
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fetches the weight and bias of a plain layer.

    Args:
        like: a tensor of the dtype and device that the layer's input has.
        until: returns the weight to the host when it closes.

    Memory: nothing where the weight is on the device in that dtype and without LoRA, else its size;
        beside it the buffers of the host's copy streams.
    """
    comfy.ops.run_every_op()  # ends a cancelled prompt, as each call of a layer does
    has_functions = layer.weight_function or layer.bias_function
    if not (layer.comfy_cast_weights or has_functions):
        return layer.weight, layer.bias
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    if _is_in_shared_buffer(layer, weight, stream):
        weight, bias = weight.clone(), None if bias is None else bias.clone()
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    elif _is_converted(weight, bias, stream):
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
    else:
        until.callback(comfy.ops.uncast_bias_weight, layer, weight, bias, stream)
    return weight, bias


def _is_converted(weight: torch.Tensor, bias: torch.Tensor | None, stream: Any) -> bool:
    """True where what was streamed is no longer needed beside what was made of it.

    Source: as `_is_in_shared_buffer`. Without dynamic VRAM the tuple holds what was streamed.
    """
    if not isinstance(stream, tuple) or not isinstance(stream[1], torch.Tensor):
        return False
    return weight is not stream[1] and (bias is None or bias is not stream[2])


def _is_in_shared_buffer(layer: Any, weight: torch.Tensor, stream: Any) -> bool:
    """True where the second fetch from now would write over the weight.

    The host has two copy streams with one buffer each: enough for a layer that is done before the
    second layer after it is fetched. We hold several. A weight is elsewhere if it has a page of its
    own, was allocated for the copy, or was converted.

    Source: cast_bias_weight and cast_modules_with_vbar in the host's comfy/ops.py.
    """
    if not isinstance(stream, tuple) or stream[0] is None:
        return False
    if hasattr(layer, "_v"):  # dynamic VRAM; the second entry names the device of its page
        return stream[1] is None
    return weight is stream[1] and not args.cuda_malloc
