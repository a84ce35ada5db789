"""What the host does with the rows of q, k and v: norm, rotary embedding, attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import comfy.ldm.lumina.model as lumina
import comfy.ops
import comfy.quant_ops
import torch
from torch import nn

from ...denoiser.attention_half import AttendFn, RotateFn
from ...denoiser.rows import RowsFn
from ..base.fetch import by_pieces, fetch_norm, fetch_weights, is_plain
from ..base.options import within_groups

# Hosts from 0.28 on fuse norm and rotary embedding; the older ones call them one after the other.
IS_FUSED = "rms_rope" in lumina.JointAttention.forward.__code__.co_names

# Rotary table of the tokens start:stop of a sample, [1, stop - start, 1, head_dim / 2, 2, 2].
RopeFn = Callable[[int, int], torch.Tensor]


def rotation(rope: RopeFn, layer: nn.Module, like: torch.Tensor, until: ExitStack) -> RotateFn:
    """Norm and rotary embedding with the norm of q or k. Last arguments as `fetch_weights`."""
    return functools.partial(_rotate, rope, layer, _norm_weight(layer, like, until))


def _norm_weight(layer: nn.Module, like: torch.Tensor, until: ExitStack) -> torch.Tensor | RowsFn:
    """What `_rotate` needs of q's or k's norm: its weight, or the norm itself on older hosts."""
    if IS_FUSED and is_plain(layer, comfy.ops.disable_weight_init.RMSNorm):
        return fetch_weights(layer, like, until)[0]
    return fetch_norm(layer, like, until)


def _rotate(
    rope: RopeFn, layer: Any, norm: torch.Tensor | RowsFn, rows: torch.Tensor, start: int
) -> torch.Tensor:
    """Norm and rotary embedding of [T, H, C] rows, whose first is token `start`, as the host's."""

    def rotate(part: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        # [T, H, C], [T, 1, C / 2, 2, 2]
        if not isinstance(norm, torch.Tensor):
            return comfy.quant_ops.ck.apply_rope1(norm(part)[None], table[None])[0]
        epsilon = layer.eps if layer.eps is not None else torch.finfo(torch.float32).eps
        return comfy.quant_ops.ck.rms_rope1(part[None], table[None], norm, epsilon)[0]

    return by_pieces(rotate, rows, rope(start, start + rows.shape[0])[0])


def _preference(attention: Any) -> dict[str, Any]:
    """The attention that the checkpoint chose for a layer, in hosts that let it (after 0.33.0)."""
    chosen = getattr(attention, "comfy_attention", None)
    return {} if chosen is None else {"preferred_attention": chosen}


def attend_of(attention: Any, transformer_options: dict[str, Any], *, is_grouped: bool) -> AttendFn:
    """The attention of one layer, which the request's override may replace.

    Args:
        is_grouped: it is called for each of the groups that were asked for.
    """
    options = within_groups(transformer_options) if is_grouped else transformer_options
    return functools.partial(_attend, _preference(attention), options)


def _attend(
    preference: dict[str, Any],
    transformer_options: dict[str, Any],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    return lumina.optimized_attention_masked(
        q,
        k,
        v,
        q.shape[1],
        None,
        skip_reshape=True,
        transformer_options=transformer_options,
        **preference,
    )
