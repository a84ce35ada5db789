"""Who computes an attention call of the host, and the buffers that it holds meanwhile.

Figures are for one head of one sample. Tests check those of the functions that run on a CPU with a
memory tracker. Those of sage attention follow from its published data types.
"""

from __future__ import annotations

from typing import NamedTuple

import comfy.ldm.modules.attention as attention
import comfy.model_management
import torch

from ...attention.budget import Workspace
from ..base.sdpa import HALF_TYPES, sdpa_choice
from .call import AttentionCall

# `attention_sub_quad` never gives more queries than this to one score buffer.
_SUB_QUAD_QUERIES = 4096
# Channels of a head that the kernel of `attention_comfy_kitchen_int8` takes; fewer are padded.
_INT8_CHANNELS = (64, 128, 256)
# `attention3_sage` leaves calls of at most so many queries to `attention_pytorch`.
_SAGE3_SHORT = 1024


class Backend(NamedTuple):
    """Who computes a call, and its workspace; None where that is not known."""

    name: str
    workspace: Workspace | None


def backend_of(call: AttentionCall) -> Backend:
    """Who computes the call."""
    if call.is_foreign:
        return Backend("the attention override of another pack", None)
    name = call.function_name
    known = _FUNCTIONS.get(name) if call.is_of_host else None
    return known(call) if known else Backend(name or "an unknown attention function", None)


def _pytorch(call: AttentionCall) -> Backend:
    item, channels = call.q.element_size(), call.channels
    choice = sdpa_choice(*call.by_head(), enable_gqa=call.enable_gqa)
    if choice is None:
        return Backend(f"PyTorch's attention on {call.q.device.type}", None)
    # The host repeats keys and values for shared heads itself where a mask is given.
    repeated = 2 * channels * item if call.enable_gqa and call.mask is not None else 0
    if choice == "fused":
        if comfy.model_management.is_nvidia():
            repeated = 0
        return Backend("PyTorch's fused attention", Workspace(per_key=repeated))
    if call.q.dtype in HALF_TYPES and call.q.device.type != "cpu":
        item = 4  # torch computes in float32 here
    copies = channels * item
    # Scores, their softmax, and a flag for each that says whether it is masked.
    workspace = Workspace(2 * item + 1, 2 * copies, 4 * copies)
    return Backend("PyTorch's math attention", workspace)


def _with_scores(call: AttentionCall) -> Backend:
    """Basic, split or sub-quadratic: they copy queries, keys and values to lie head by head."""
    item, name = call.q.element_size(), call.function_name
    # Scores are float32 where the model or the user asks for it.
    precision = attention.get_attn_precision(call.attn_precision, call.q.dtype)
    is_widened = precision == torch.float32 and item < 4
    size = 4 if is_widened else item
    score, copy = 2 * size + _mask_copy(call), call.channels * item
    if name == "attention_sub_quad":
        wide = call.channels * size if is_widened else 0
        workspace = Workspace(score, 3 * copy + wide, 2 * copy + wide, _SUB_QUAD_QUERIES)
    elif name == "attention_split":
        score += item if is_widened else 0
        workspace = Workspace(score, (2 + is_widened) * copy, 2 * copy)
    else:
        workspace = Workspace(score, (1 + is_widened) * copy, 2 * copy)
    return Backend(name, workspace)


def _sage(call: AttentionCall) -> Backend:
    takes_mask = getattr(attention, "SAGE_ATTENTION_SUPPORTS_MASK", True)
    is_exact = call.options.get("low_precision_attention", True) is False
    if is_exact or (call.mask is not None and not takes_mask) or not _is_half_on_cuda(call):
        return _pytorch(call)
    # q and k in int8, v in fp8 after a transposed copy in its own type.
    return Backend(
        "sage attention", Workspace(0, call.channels, 4 * call.channels + _repeats(call))
    )


def _sage3(call: AttentionCall) -> Backend:
    is_short = call.q.shape[-2] <= _SAGE3_SHORT or call.channels >= 256
    if is_short or call.mask is not None or not _is_half_on_cuda(call):
        return _pytorch(call)
    copied = 0 if call.skip_reshape else call.channels * call.q.element_size()
    half = call.channels // 2  # four bits for each of q, k and v
    return Backend(
        "sage attention 3", Workspace(0, half + copied, 2 * (half + copied) + _repeats(call))
    )


def _int8(call: AttentionCall) -> Backend:
    """comfy_kitchen's own, as its sage_attention.py allocates; cards alone have it."""
    item, channels = call.q.element_size(), call.channels
    width = next((wide for wide in _INT8_CHANNELS if wide >= channels), channels)
    copy = width * item if width > channels else 0
    # q, k and v in int8 with their scales; a result that is padded, or converted to float32.
    result = 2 * (width - channels) + (width if item == 4 else 0)
    workspace = Workspace(0, width + 1 + copy + result, 2 * (width + copy) + 1)
    return Backend("Comfy Kitchen's INT8 attention", workspace)


def _flash(call: AttentionCall) -> Backend:
    if call.mask is not None or call.channels > 256 or not _is_half_on_cuda(call):
        return _pytorch(call)  # the host's own fallback
    return Backend("flash attention", Workspace())


def _xformers(call: AttentionCall) -> Backend:
    return Backend("xformers attention", Workspace(per_key=_repeats(call)))


_FUNCTIONS = {
    "attention_pytorch": _pytorch,
    "attention_basic": _with_scores,
    "attention_split": _with_scores,
    "attention_sub_quad": _with_scores,
    "attention_sage": _sage,
    "attention3_sage": _sage3,
    "attention_comfy_kitchen_int8": _int8,
    "attention_flash": _flash,
    "attention_xformers": _xformers,
}


def _is_half_on_cuda(call: AttentionCall) -> bool:
    """Where sage and flash attention run at all; elsewhere the host falls back to PyTorch's."""
    return call.q.device.type == "cuda" and call.q.dtype in HALF_TYPES


def _mask_copy(call: AttentionCall) -> int:
    """A mask that differs between samples or heads is copied out for every head of every sample."""
    mask = call.mask
    if mask is None or mask.ndim == 2 or mask.shape[-2] == 1 or call.q.shape[0] == 1:
        return 0
    return mask.element_size() if mask.shape[:-2].numel() > 1 else 0


def _repeats(call: AttentionCall) -> int:
    """Bytes for each key where the host repeats keys and values for shared heads."""
    return 2 * call.channels * call.q.element_size() if call.enable_gqa else 0
