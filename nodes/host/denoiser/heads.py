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
from ...denoiser.attention_half import AttendFn, RotateFn
from ...denoiser.rows import RowsFn
from ..base.fetch import PIECE_ELEMENTS, fetch_norm, fetch_weights, is_plain
from ..base.options import within_groups

# Hosts from 0.28 on fuse norm and rotary embedding; the older ones call them one after the other.
IS_FUSED = "rms_rope" in lumina.JointAttention.forward.__code__.co_names

# Older releases of comfy-kitchen only make new tensors.
IN_PLACE = hasattr(comfy.quant_ops.ck, "rms_rope_")

# Rotary table of the tokens start:stop of a sample, [1, stop - start, 1, head_dim / 2, 2, 2].
RopeFn = Callable[[int, int], torch.Tensor]


def views_of(table: torch.Tensor) -> RopeFn:
    """The rotary table of any run of tokens as a view of that of all, [1, T, 1, C / 2, 2, 2]."""
    return lambda start, stop: table[:, start:stop]


def rotation(
    rope: RopeFn, attention: Any, like: torch.Tensor, until: ExitStack, *, most_tokens: int
) -> RotateFn:
    """Norm and rotary embedding of q and k, in place. Two arguments as `fetch_weights`.

    Args:
        rope: the table of a run of tokens.
        attention: the layer with q_norm and k_norm.
        most_tokens: rows at a time, at most: of the table, and of what older hosts hold.
    """
    layers = attention.q_norm, attention.k_norm
    norms = [_norm_weight(layer, like, until) for layer in layers]

    def rotate(query: torch.Tensor | None, key: torch.Tensor | None, start: int) -> None:
        given = [
            (rows, layer, norm)
            for rows, layer, norm in zip((query, key), layers, norms, strict=True)
            if rows is not None
        ]
        tokens, step = given[0][0].shape[0], most_tokens
        if like.device.type == "cpu":  # no kernel fuses the steps there
            step = max(1, min(step, PIECE_ELEMENTS // given[0][0][0].numel()))
        for first, last in pieces(tokens, step):
            _rotate_(
                [(rows[first:last][None], layer, norm) for rows, layer, norm in given],
                rope(start + first, start + last),
            )

    return rotate


def _norm_weight(layer: nn.Module, like: torch.Tensor, until: ExitStack) -> torch.Tensor | RowsFn:
    """What `_rotate_` needs of q's or k's norm: its weight, or the norm itself on older hosts."""
    if IS_FUSED and is_plain(layer, comfy.ops.disable_weight_init.RMSNorm):
        # In-place kernels refuse what requires a gradient, even where none is recorded.
        return fetch_weights(layer, like, until)[0].detach()
    return fetch_norm(layer, like, until)


def _rotate_(
    parts: list[tuple[torch.Tensor, Any, torch.Tensor | RowsFn]], table: torch.Tensor
) -> None:
    """Norm and rotary embedding of q, k or both, [1, T, H, C], in place, as the host's.

    Args:
        parts: rows, the layer of their norm, and what `_norm_weight` gave for it.
        table: [1, T, 1, C / 2, 2, 2].
    """
    scales = [norm for _, _, norm in parts if isinstance(norm, torch.Tensor)]
    if len(scales) == 2 and IN_PLACE and parts[0][0].shape == parts[1][0].shape:
        (query, layer, _), (key, _, _) = parts
        comfy.quant_ops.ck.rms_rope_(query, key, table, *scales, _epsilon(layer))
        return
    for rows, layer, norm in parts:
        if not isinstance(norm, torch.Tensor):
            rows.copy_(comfy.quant_ops.ck.apply_rope1(norm(rows), table))
        elif IN_PLACE:
            comfy.quant_ops.ck.rms_rope1_(rows, table, norm, _epsilon(layer))
        else:
            rows.copy_(comfy.quant_ops.ck.rms_rope1(rows, table, norm, _epsilon(layer)))


def _epsilon(layer: Any) -> float:
    return layer.eps if layer.eps is not None else torch.finfo(torch.float32).eps


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
