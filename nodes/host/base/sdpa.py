"""Which kernel torch's scaled_dot_product_attention takes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import comfy.ops
import torch
from torch.backends import cuda
from torch.nn.attention import sdpa_kernel

HALF_TYPES = (torch.float16, torch.bfloat16)


def sdpa_choice(
    query: Any, key: Any, value: Any, mask: Any = None, *, enable_gqa: bool = False
) -> Literal["fused", "math"] | None:
    """Which kernel torch's scaled_dot_product_attention takes; None if torch does not say.

    Args:
        query: [B, H, T, D].
        key: [B, Hk, S, D].
        value: [B, Hk, S, Dv].
        mask: None, or with 2 or 4 axes.
        enable_gqa: Hk < H is allowed.

    Returns:
        "fused" (flash, cuDNN or memory-efficient: no scores), "math" (scores exist), or None.
    """
    device = query.device.type
    if device == "cpu":
        return "fused" if _cpu_fuses(query, key, value, mask, enable_gqa) else "math"
    if device == "mps":
        return "math"
    if device != "cuda":
        return None
    if torch.compiler.is_compiling():
        return "fused"  # the questions below would break the graph; math is a rare fallback
    if not torch.cuda.is_available():  # fake tensors
        return None
    params = cuda.SDPAParams(query, key, value, mask, 0.0, False, enable_gqa)
    priority = getattr(comfy.ops, "SDPA_BACKEND_PRIORITY", None)
    asked = (
        cuda.can_use_flash_attention,
        cuda.can_use_efficient_attention,
        cuda.can_use_cudnn_attention,
    )
    # As the host calls it: what a user switched off is on again.
    with sdpa_kernel(priority) if priority is not None else nullcontext():
        return "fused" if any(can_use(params) for can_use in asked) else "math"


def _cpu_fuses(query: Any, key: Any, value: Any, mask: Any, enable_gqa: bool) -> bool:
    """The conditions of torch's CPU kernel (sdp_utils_cpp.cpp); tests compare with its choice."""
    batch, heads, queries, channels = query.shape
    same_heads = key.shape[1] == value.shape[1] == heads
    shares = enable_gqa and key.shape[1] == value.shape[1] and heads % key.shape[1] == 0
    # While a graph is compiled the question cannot be asked; switched on is torch's default.
    is_enabled = torch.compiler.is_compiling() or cuda.flash_sdp_enabled()
    fits = (
        is_enabled
        and query.dtype in (torch.float64, torch.float32, *HALF_TYPES)
        and key.shape[0] == value.shape[0] == batch
        and (same_heads or shares)
        and key.shape[-1] == value.shape[-1] == channels
        and queries * key.shape[2] > 0
        and all(t.stride(-1) == 1 for t in (query, key, value))
    )
    if not fits or mask is None:
        return fits
    if mask.ndim not in (2, 4) or mask.requires_grad:
        return False
    wanted = (batch, heads, queries, key.shape[2])[-mask.ndim :]
    return all(n in (1, m) for n, m in zip(mask.shape, wanted, strict=True))
