"""Reads the host's KL image decoder and encoder as the layers that nodes/vae computes with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.diffusionmodules.model as kl
import comfy.model_management
import comfy.ops
import torch
from torch import nn

from ...vae.layers import (
    AttendFn,
    AttentionLayers,
    BlockLayers,
    ConvLayer,
    Fetch,
    LevelLayers,
    NormLayer,
    VaeLayers,
)
from ...vae.plan import VaeSizes
from ..base.fetch import fetch_weights, is_plain
from ..base.sdpa import sdpa_choice

_PLAIN = comfy.ops.disable_weight_init
# Scores of one part of the queries where attention is not fused, in bytes: as many as the keys
# have, so that a large map's keys and values are not read too often, and at least these.
_SCORE_BYTES = 2**24


def why_not(model: Any) -> str | None:
    """Why a decoder or encoder cannot run in strips; None if it can."""
    kind = type(model)
    if model is None or kind not in (kl.Decoder, kl.Encoder):
        return f"its {kind.__name__} is not the KL image VAE's"
    if model.carried or getattr(model, "tanh_out", False):
        return "it is a video VAE"
    for name, layer in model.named_modules():
        reason = _why_not_layer(layer)
        if reason is not None:
            return f"{name or kind.__name__} {reason}"
    if any(level.attn for level in _levels(model)):
        return "it has attention outside its middle"
    return None


def _why_not_layer(layer: Any) -> str | None:
    parts = {
        kl.Decoder: lambda: True,
        kl.Encoder: lambda: True,
        kl.ResnetBlock: lambda: not (hasattr(layer, "temb_proj") or layer.use_conv_shortcut),
        kl.AttnBlock: lambda: True,
        kl.Upsample: lambda: layer.with_conv and layer.scale_factor == 2.0,
        kl.Downsample: lambda: layer.with_conv,
        nn.SiLU: lambda: True,
        nn.Dropout: lambda: layer.p == 0 or not layer.training,
        nn.Module: lambda: True,
        nn.ModuleList: lambda: True,
    }
    if isinstance(layer, _PLAIN.Conv2d):
        fine = is_plain(layer, _PLAIN.Conv2d) and layer.groups == 1
        shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode
        fine = fine and shape in _CONVOLUTIONS
    elif isinstance(layer, _PLAIN.GroupNorm):
        fine = is_plain(layer, _PLAIN.GroupNorm) and layer.affine
    elif type(layer) in parts:
        fine = parts[type(layer)]() and "forward" not in vars(layer)
        fine = fine and not (layer._forward_hooks or layer._forward_pre_hooks)
    else:
        fine = False
    return None if fine else f"is a {type(layer).__name__} of another kind"


_CONVOLUTIONS = {
    ((3, 3), (1, 1), (1, 1), (1, 1), "zeros"),
    ((3, 3), (2, 2), (0, 0), (1, 1), "zeros"),
    ((1, 1), (1, 1), (0, 0), (1, 1), "zeros"),
}


def sizes(model: Any) -> VaeSizes:
    """The sizes of a decoder or encoder for which `why_not` is None."""
    is_decoder = type(model) is kl.Decoder
    levels = _levels(model)
    ends = model.conv_in.in_channels, model.conv_out.out_channels
    latent, picture = ends if is_decoder else ends[::-1]
    return VaeSizes(
        is_decoder=is_decoder,
        widths=tuple(level.block[-1].out_channels for level in levels),
        blocks=len(levels[0].block),
        latent_channels=latent,
        picture_channels=picture,
    )


def _levels(model: Any) -> list[Any]:
    """The levels in the order in which they are called."""
    return list(reversed(model.up)) if type(model) is kl.Decoder else list(model.down)


def read(model: Any, like: torch.Tensor) -> VaeLayers:
    """The layers of a decoder or encoder for which `why_not` is None.

    Args:
        like: a tensor of the dtype and on the device of the arithmetic.
    """

    def weights(layer: Any) -> Fetch:
        return lambda until: fetch_weights(layer, like, until)

    def norm(layer: Any) -> NormLayer:
        return NormLayer(weights(layer), layer.num_groups, layer.eps)

    def conv(layer: Any) -> ConvLayer:
        return ConvLayer(weights(layer), layer.out_channels)

    def block(layer: Any) -> BlockLayers:
        is_wider = layer.in_channels != layer.out_channels
        return BlockLayers(
            norm1=norm(layer.norm1),
            conv1=conv(layer.conv1),
            norm2=norm(layer.norm2),
            conv2=conv(layer.conv2),
            shortcut=conv(layer.nin_shortcut) if is_wider else None,
        )

    def level(part: Any) -> LevelLayers:
        resample = getattr(part, "upsample", None) or getattr(part, "downsample", None)
        blocks = [block(layer) for layer in part.block]
        return LevelLayers(blocks, None if resample is None else conv(resample.conv))

    attn = model.mid.attn_1
    attend, most_queries = attend_with(like.device)
    attention = AttentionLayers(
        norm=norm(attn.norm),
        query=weights(attn.q),
        key=weights(attn.k),
        value=weights(attn.v),
        out=weights(attn.proj_out),
        attend=attend,
        most_queries=most_queries,
    )
    return VaeLayers(
        conv_in=conv(model.conv_in),
        levels=[level(part) for part in _levels(model)],
        middle=(block(model.mid.block_1), attention, block(model.mid.block_2)),
        norm_out=norm(model.norm_out),
        conv_out=conv(model.conv_out),
    )


def attend_with(device: torch.device) -> tuple[AttendFn, Callable[[torch.Tensor], int]]:
    """The attention of a VAE on the device, and how many queries it may get at a time."""
    if _has_sdpa(device):
        return comfy.ops.scaled_dot_product_attention, _most_queries
    return _attend_by_scores, _most_by_scores


def _has_sdpa(device: torch.device) -> bool:
    """Whether a card's VAE may use torch's attention: not on AMD, nor where the user forbids it."""
    return device.type != "cuda" or comfy.model_management.pytorch_attention_enabled_vae()


def _attend_by_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """An `AttendFn` that computes as the host's slice_attention does."""
    scores = (query @ key.transpose(2, 3)).mul_(query.shape[3] ** -0.5)
    return scores.softmax(3) @ value


def _most_queries(keys: torch.Tensor) -> int:
    """All of them where attention is fused; else as many as scores allow."""
    is_fused = sdpa_choice(keys, keys, keys) == "fused"
    return keys.shape[2] if is_fused else _most_by_scores(keys)


def _most_by_scores(keys: torch.Tensor) -> int:
    """As many queries as the bytes for scores allow, which are held about twice in float32."""
    return max(1, max(_SCORE_BYTES, keys.nbytes) // (8 * keys.shape[2]))
