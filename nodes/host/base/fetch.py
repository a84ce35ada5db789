"""Fetches a layer's weight once, for code that then uses it for many chunks.

The host streams a weight from RAM (and applies LoRA, and casts fp8) at each call of a layer. A loop
that called the layer once per chunk would pay that once per chunk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import comfy.ops
import torch
from comfy.cli_args import args
from comfy.model_management import lora_compute_dtype
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from torch import nn
from torch.nn import functional

from ...cuts import pieces

RowsFn = Callable[[torch.Tensor], torch.Tensor]

PIECE_ELEMENTS = 2**17
_PLAIN = comfy.ops.disable_weight_init


def is_plain(layer: Any, kind: type) -> bool:
    """True where the layer multiplies as torch does, after the host's cast.

    False for quantised layers, for layers of other packs and for layers whose forward was replaced.
    """
    return isinstance(layer, kind) and has_forward_of(layer, kind)


def has_forward_of(layer: Any, kind: type) -> bool:
    """True where the layer runs the forward of that class of the host, and no hooks."""
    # Of the layer, not of its class: a bypass LoRA sits on the layer alone, and packs that make
    # pictures tileable put a `_conv_forward` there.
    parts = ("forward", "forward_comfy_cast_weights", "_conv_forward")
    return (
        all(_function(getattr(layer, p)) is getattr(kind, p) for p in parts if hasattr(kind, p))
        and "_forward" not in vars(layer)  # what quantised layers multiply with
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(method, "__func__", method)


def fetch_norm(layer: Any, like: torch.Tensor, until: ExitStack) -> RowsFn:
    """Fetches the weight of an RMS norm; returns the norm of rows. Arguments as `fetch_weights`."""
    if not is_plain(layer, _PLAIN.RMSNorm):
        return _into_own(layer)
    weight, _ = fetch_weights(layer, like, until)
    return lambda rows: by_pieces(
        lambda part: functional.rms_norm(part, layer.normalized_shape, weight, layer.eps), rows
    )


def fetch_layer_norm(layer: Any, like: torch.Tensor, until: ExitStack) -> RowsFn:
    """Fetches weight and bias of a layer norm; returns the norm of rows. As `fetch_norm`."""
    if not is_plain(layer, _PLAIN.LayerNorm):
        return _into_own(layer)
    weight, bias = (None, None) if layer.weight is None else fetch_weights(layer, like, until)
    return lambda rows: functional.layer_norm(rows, layer.normalized_shape, weight, bias, layer.eps)


def _into_own(layer: Any) -> RowsFn:
    """The layer with results that may be written over.

    Its hooks may keep what it gets, rows of a stream that a block writes over, and what it returns.
    """
    if type(layer) is nn.Identity and not (layer._forward_hooks or layer._forward_pre_hooks):
        return torch.clone
    return lambda rows: layer(rows.clone()).clone()


def by_pieces(function: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """Applies a row-wise function to rows [T, ...]; on the CPU a few rows at a time.

    The CPU has no fused norm and rotary embedding: their steps hold several float32 copies.

    Memory: the result; on the CPU also the copies of `PIECE_ELEMENTS` elements.
    Exact: bit-exact, rows are independent.
    """
    tokens = rows[0].shape[0]
    piece = max(1, PIECE_ELEMENTS // max(1, rows[0][:1].numel()))
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
    if not (layer.comfy_cast_weights or has_functions or is_mixed(layer)):
        return layer.weight, layer.bias
    weight, bias, stream = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
    return _held(layer, weight, bias, stream, until, is_dequantised=True)


def fetch_stored(
    layer: Any, like: torch.Tensor, until: ExitStack
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `fetch_weights`, with the weight as stored; of a layer without functions of its weights.

    Memory: nothing where the weight is on the device, else its size as stored.
    """
    comfy.ops.run_every_op()
    weight, bias, stream = comfy.ops.cast_bias_weight(
        layer,
        dtype=layer.weight.dtype,
        device=like.device,
        bias_dtype=like.dtype,
        offloadable=True,
    )
    return _held(layer, weight, bias, stream, until)


def fetch_quantised(layer: Any, like: torch.Tensor, until: ExitStack) -> Any:
    """Fetches the weight of a layer that `multiplies_quantised`; returns what multiplies rows.

    That is a copy of the layer with the fetched weight, whose forward is the host's own: it
    quantises and multiplies rows as ever, and moves nothing. Arguments as `fetch_weights`.

    Memory: nothing where the weight is on the device, else its size as stored.
    """
    comfy.ops.run_every_op()
    is_fp8 = isinstance(layer, comfy.ops.fp8_ops.Linear)
    weight, bias, stream = comfy.ops.cast_bias_weight(
        layer,
        dtype=layer.weight.dtype,
        device=like.device,
        bias_dtype=like.dtype,
        offloadable=True,
        compute_dtype=lora_compute_dtype(like.device) if is_fp8 else like.dtype,
        want_requant=is_fp8 or not _is_emulated(layer),
    )
    weight, bias = _held(layer, weight, bias, stream, until)
    fetched = copy.copy(layer)
    fetched.__dict__.pop("_v", None)  # dynamic VRAM would look for its page
    fetched._parameters = {**layer._parameters, "weight": weight, "bias": bias}
    return fetched


def is_mixed(layer: Any) -> bool:
    """True for the linear layers of checkpoints with quantised ones, plain ones among them.

    False for subclasses of other packs that multiply in their own way.
    """
    parts = ("forward", "forward_comfy_cast_weights", "_forward")
    return hasattr(layer, "_full_precision_mm") and all(
        getattr(type(layer), part).__module__ == "comfy.ops" for part in parts
    )


def multiplies_quantised(layer: Any) -> bool:
    """True for a layer of the host that does not multiply by a weight of the rows' dtype.

    False for a quantised layer on a card that cannot, and where LoRA changes the weight: the host
    dequantises it.

    Source: forward of mixed_precision_ops' Linear and of fp8_ops.Linear in the host's comfy/ops.py.
    """
    if layer.weight_function or layer.bias_function:
        return False
    if isinstance(layer, comfy.ops.fp8_ops.Linear):
        return layer.weight.dtype == torch.float8_e4m3fn
    if not isinstance(layer.weight, QuantizedTensor):
        return False
    # Formats that do not quantise rows in the layer do so in each product.
    quantises_rows = QUANT_ALGOS[layer.quant_format].get("quantize_input", True)
    return not (_is_emulated(layer) and quantises_rows)


def mixes_rows(layer: Any) -> bool:
    """True where the rows of a call share a scale that is made of them: nvfp4 without its own.

    Chunks then have a scale each, so that results differ from those of one call by rounding.
    """
    return (
        is_mixed(layer)
        and getattr(layer, "quant_format", None) == "nvfp4"
        and layer._parameters.get("input_scale") is None
        and multiplies_quantised(layer)
    )


def _is_emulated(layer: Any) -> bool:
    return layer._full_precision_mm or getattr(layer, "comfy_force_cast_weights", False)


def _held(
    layer: Any,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stream: Any,
    until: ExitStack,
    *,
    is_dequantised: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `cast_bias_weight` gave, so that it stays what it is until the stack closes."""
    with ExitStack() as now:  # also where memory for a copy is missing
        now.callback(lambda: comfy.ops.uncast_bias_weight(layer, weight, bias, stream))
        if is_dequantised and isinstance(weight, QuantizedTensor):
            weight = weight.dequantize()
        if _is_in_shared_buffer(layer, weight, bias, stream):
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        elif not _is_converted(weight, stream):
            until.push(now.pop_all())
        elif bias is not None and bias is stream[2]:  # a LoRA changes weights alone
            bias = bias.clone()
    return weight, bias


def _is_converted(weight: torch.Tensor, stream: Any) -> bool:
    """True where the streamed weight is no longer needed beside what was made of it.

    Source: as `_is_in_shared_buffer`. Without dynamic VRAM the tuple holds what was streamed.
    """
    is_streamed = isinstance(stream, tuple) and isinstance(stream[1], torch.Tensor)
    return is_streamed and weight is not stream[1]


def _is_in_shared_buffer(
    layer: Any, weight: torch.Tensor, bias: torch.Tensor | None, stream: Any
) -> bool:
    """True where the second fetch from now would write over the weight or the bias.

    The host has two copy streams with one buffer each: enough for a layer that is done before the
    second layer after it is fetched. We hold several. A weight is elsewhere if it has a page of its
    own, was allocated for the copy, or was converted. One that was prefetched comes without a
    stream, and lies in a buffer of its block until the block after it has ended.

    Source: cast_bias_weight and cast_modules_with_vbar in the host's comfy/ops.py.
    """
    if not isinstance(stream, tuple) or stream[0] is None:
        return False
    if hasattr(layer, "_v"):  # dynamic VRAM; the second entry names the device of its page
        has_scales = [isinstance(w, QuantizedTensor) for w in (weight, layer.weight)]
        is_converted = has_scales[0] != has_scales[1] or weight.dtype != layer.weight.dtype
        return stream[1] is None and not (is_converted and bias is None)
    is_streamed = weight is stream[1] or (bias is not None and bias is stream[2])
    return is_streamed and not args.cuda_malloc
