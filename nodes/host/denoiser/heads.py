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

from ...cuts import pieces
from ...denoiser.attention_half import AttendFn
from ...denoiser.attention_part import RotateFn
from ...denoiser.cuts import DenoiserPlan
from ...denoiser.parallel import TurnFn
from ...denoiser.rows import RowsFn
from ..base.fetch import PIECE_ELEMENTS, fetch_norm, fetch_weights, is_plain
from ..base.options import within_groups

# Hosts from 0.28 on fuse norm and rotary embedding; the older ones call them one after the other.
IS_FUSED = "rms_rope" in lumina.JointAttention.forward.__code__.co_names

# Older releases of comfy-kitchen only make new tensors.
IN_PLACE = hasattr(comfy.quant_ops.ck, "rms_rope1_")
# Where no kernel fuses the steps, they hold up to six float32 copies of what they are given: parts
# of a chunk hold less than the chunk's own end.
UNFUSED_PARTS = 8

# Rotary table of the tokens start:stop of a sample, [1, stop - start, 1, head_dim / 2, 2, 2].
RopeFn = Callable[[int, int], torch.Tensor]


def views_of(table: torch.Tensor) -> RopeFn:
    """The rotary table of any run of tokens as a view of that of all, [B, T, 1, C / 2, 2, 2]."""
    return lambda start, stop: table[:1, start:stop]


def rotation(
    rope: RopeFn,
    layers: tuple[Any, Any],
    channels: int,
    like: torch.Tensor,
    until: ExitStack,
    plan: DenoiserPlan,
    *,
    is_fused: bool = IS_FUSED,
) -> RotateFn:
    """Norm and rotary embedding of q and k, in place. Two arguments as `fetch_weights`.

    Args:
        rope: the table of a run of tokens.
        layers: the norms of q and of k; None where there are none.
        channels: of a head.
        is_fused: whether the host's block fuses the two.
    """
    norm_of = _norm_weight if is_fused else fetch_norm
    norms = [None if layer is None else norm_of(layer, like, until) for layer in layers]
    copies = not is_fused and any(norm is not None for norm in norms)

    def rotate(query: torch.Tensor | None, key: torch.Tensor | None, start: int) -> None:
        given = [
            (rows, layer, norm)
            for rows, layer, norm in zip((query, key), layers, norms, strict=True)
            if rows is not None
        ]
        tokens = step = given[0][0].shape[0]
        if not plan.holds_rope:
            step = plan.rope_tokens(like.shape[-1], channels)
        if not (IN_PLACE and _has_kernel(like.device, like.dtype, channels)):
            step = min(step, max(1, plan.chunk_tokens // UNFUSED_PARTS))
        elif copies:  # a copy, which is no more than the rows that q and k were made of
            step = min(step, 2 * plan.chunk_tokens)
        if like.device.type == "cpu":
            step = max(1, min(step, PIECE_ELEMENTS // given[0][0][0].numel()))
        for first, last in pieces(tokens, step):
            table = rope(start + first, start + last)
            for rows, layer, norm in given:
                _rotate_(rows[first:last][None], layer, norm, table)

    return rotate


@functools.cache
def _has_kernel(device: torch.device, dtype: torch.dtype, channels: int) -> bool:
    """Whether a kernel of comfy-kitchen fuses norm and rotary embedding on the device.

    The host has it for CUDA 13 and newer, and for half types.
    """
    if device.type == "meta" or (device.type == "cuda" and not torch.cuda.is_available()):
        return True  # tensors without data stand for a card's
    choose = getattr(comfy.quant_ops.ck.registry, "get_capable_backend", None)
    if choose is None:
        return False
    rows = torch.empty(1, 1, 1, channels, dtype=dtype, device=device)
    table = torch.empty(1, 1, 1, channels // 2, 2, 2, device=device)
    given = {"x": rows, "freqs_cis": table, "scale": rows.view(-1), "epsilon": 1e-6}
    return choose("rms_rope1", given) != "eager"


def _norm_weight(layer: nn.Module, like: torch.Tensor, until: ExitStack) -> torch.Tensor | RowsFn:
    """What `_rotate_` needs of q's or k's norm: its weight, or the norm itself on older hosts."""
    if is_plain(layer, comfy.ops.disable_weight_init.RMSNorm):
        # In-place kernels refuse what requires a gradient, even where none is recorded.
        return fetch_weights(layer, like, until)[0].detach()
    return fetch_norm(layer, like, until)


def _rotate_(
    rows: torch.Tensor, layer: Any, norm: torch.Tensor | RowsFn | None, table: torch.Tensor
) -> None:
    """Norm and rotary embedding of q or k, [1, T, H, C], in place, as the host's.

    q and k are not given together: releases of comfy-kitchen refuse two views of one buffer.

    Args:
        norm: what `_norm_weight` gave for the layer; None without one.
        table: [1, T, 1, C / 2, 2, 2].
    """
    if norm is None:
        turned = _turned(rows, table)
        if not _turns_in_place(rows):
            rows.copy_(turned)
        return
    if not isinstance(norm, torch.Tensor):
        rows.copy_(_turned(norm(rows), table))
        return
    epsilon = layer.eps if layer.eps is not None else torch.finfo(torch.float32).eps
    if IN_PLACE:
        comfy.quant_ops.ck.rms_rope1_(rows, table, norm, epsilon)
    else:
        rows.copy_(comfy.quant_ops.ck.rms_rope1(rows, table, norm, epsilon))


def _turned(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows with their rotary embedding, [1, T, H, C]; writes over them where a kernel can."""
    if _turns_in_place(rows):
        return comfy.quant_ops.ck.apply_rope1_(rows, table)
    return comfy.quant_ops.ck.apply_rope1(rows, table)


def _turns_in_place(rows: torch.Tensor) -> bool:
    return IN_PLACE and rows.device.type != "cpu"


def turning(
    rope: RopeFn, layer: Any, rotate: RotateFn, like: torch.Tensor, until: ExitStack
) -> TurnFn:
    """Norm and rotary embedding of q, of which a kernel makes new rows without a copy back.

    Args:
        rope: the table of a run of tokens.
        layer: the norm of q.
        rotate: what is done where there is no kernel.
        like, until: see `fetch_weights`.
    """
    if not (IN_PLACE and _has_kernel(like.device, like.dtype, layer.weight.shape[-1])):

        def rotated(query: torch.Tensor, start: int) -> torch.Tensor:
            rotate(query, None, start)
            return query

        return rotated
    norm = fetch_norm(layer, like, until)
    return lambda query, start: _turned(norm(query[None]), rope(start, start + len(query)))[0]


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
