"""Reads the host's Wan VAEs (Wan 2.1, Qwen-Image; Wan 2.2) as the layers of nodes/vae/video."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.ldm.wan.vae as wan
import comfy.ldm.wan.vae2_2 as wan22
import comfy.ops
import torch
from torch import nn
from torch.nn import functional

from ...vae.layers import AttentionWeights, Fetch
from ...vae.video.layers import (
    AnyLayers,
    AttentionBlock,
    BlockLayers,
    ConvLayers,
    PointLayers,
    ResampleLayers,
    RmsLayer,
    VideoLayers,
)
from ...vae.video.sizes import Link, Shortcut, VideoSizes, shortcut_around
from ..base.fetch import fetch_weights, is_plain
from .layers import attend_with

_PLAIN = comfy.ops.disable_weight_init
_HALF_TYPES = (torch.float16, torch.bfloat16)
_BLOCKS = (wan.ResidualBlock, wan22.ResidualBlock)


def is_known_class(model: Any) -> bool:
    """Whether a model is one of the host's two WanVAEs or a subclass of them."""
    return isinstance(model, (wan.WanVAE, wan22.WanVAE))


def why_not(model: Any) -> str | None:
    """Why a WanVAE cannot run in strips; None if it can."""
    if type(model) not in (wan.WanVAE, wan22.WanVAE):
        return f"it is a {type(model).__name__}, not the WanVAE of Wan 2.1 or that of Wan 2.2"
    replaced = {"decode", "encode", "forward"} & vars(model).keys()
    if replaced:
        return f"its {min(replaced)} was replaced"
    if model.attn_scales:
        return "it has attention outside its middle"
    for name, layer in model.named_modules():
        if name and not _is_known(layer):
            return f"{name} is a {type(layer).__name__} of another kind"
    return None


def _is_known(layer: Any) -> bool:
    if isinstance(layer, wan.CausalConv3d):
        shape = layer.kernel_size, layer.stride, layer.padding, layer._padding
        fine = is_plain(layer, wan.CausalConv3d) and shape in _CAUSAL
        return fine and _is_usual(layer, (1, 1, 1))
    if isinstance(layer, _PLAIN.Conv2d):
        shape = layer.kernel_size, layer.stride, layer.padding
        fine = is_plain(layer, _PLAIN.Conv2d) and shape in _PLAIN_2D
        return fine and _is_usual(layer, (1, 1))
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    if type(layer) in (wan.Resample, wan22.Resample):
        return layer.mode in ("upsample3d", "upsample2d", "downsample3d", "downsample2d")
    if type(layer) in (wan22.Up_ResidualBlock, wan22.Down_ResidualBlock):
        return _is_known_group(layer)
    if type(layer) is wan.RMS_norm:
        return layer.channel_first and layer.bias is None
    if type(layer) is nn.Upsample:
        return layer.scale_factor == (2.0, 2.0) and layer.mode == "nearest-exact"
    if type(layer) is nn.ZeroPad2d:
        return layer.padding == (0, 1, 0, 1)
    if type(layer) is nn.Dropout:
        return layer.p == 0 or not layer.training
    return type(layer) in _PARTS


def _is_usual(conv: Any, dilation: tuple[int, ...]) -> bool:
    return conv.groups == 1 and conv.dilation == dilation and conv.padding_mode == "zeros"


def _is_known_group(group: Any) -> bool:
    """Whether its shortcut is one of nodes/vae/video/shortcut.py that fits its layers."""
    host, is_up = group.avg_shortcut, type(group) is wan22.Up_ResidualBlock
    if any(type(part) not in (wan22.ResidualBlock, wan22.Resample) for part in _inner(group)):
        return False
    links = _links(group, None)
    short = shortcut_around(links, 0, len(links))
    if host is None:
        return is_up and short.way == "same"
    scale = 1 if short.way == "same" else 2
    sizes = host.in_channels, host.out_channels, host.factor_t, host.factor_s
    if sizes != (short.given, short.made, short.frames, scale):
        return False
    if type(host) is wan22.DupUp3D:
        # Both columns of an element come from one channel.
        is_even = short.given % short.made == 0 and host.repeats % 2 == 0
        return is_up and short.way == "up" and is_even
    return not is_up and short.way != "up" and host.group_size == scale**2


_PARTS = {
    *(wan.Decoder3d, wan.Encoder3d, wan.ResidualBlock, wan.AttentionBlock),
    *(wan22.Decoder3d, wan22.Encoder3d, wan22.ResidualBlock),
    *(wan22.AvgDown3D, wan22.DupUp3D, nn.Sequential, nn.SiLU, nn.Identity),
}
# Kernel, stride, padding, and what is added in time.
_CAUSAL = {
    ((3, 3, 3), (1, 1, 1), (0, 1, 1), 2),
    ((1, 1, 1), (1, 1, 1), (0, 0, 0), 0),
    ((3, 1, 1), (1, 1, 1), (0, 0, 0), 2),
    ((3, 1, 1), (2, 1, 1), (0, 0, 0), 0),
}
_PLAIN_2D = {
    ((3, 3), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (0, 0)),
    ((1, 1), (1, 1), (0, 0)),
}


def sizes(model: Any, *, is_decoder: bool) -> VideoSizes:
    """The sizes of the decoder or encoder of a WanVAE for which `why_not` is None."""
    links: list[Link] = []
    shortcuts: list[Shortcut] = []
    cut = 0
    for part in _parts(model, is_decoder=is_decoder):
        first = len(links)
        if isinstance(part, wan.AttentionBlock):
            cut = first
        links += _links(part, model)
        if getattr(part, "avg_shortcut", None) is not None:
            shortcuts.append(shortcut_around(links, first, len(links)))
    # The two blocks around the attention run on whole frames too.
    cut = cut + 2 if is_decoder else cut - 1
    patch = 2 if type(model) is wan22.WanVAE else 1
    return VideoSizes(is_decoder, tuple(links), cut, tuple(shortcuts), patch)


def _parts(model: Any, *, is_decoder: bool) -> Iterator[Any]:
    """The host's modules in the order in which it calls them; a head is a Sequential."""
    if is_decoder:
        yield from (model.conv2, model.decoder.conv1, *model.decoder.middle)
        yield from (*model.decoder.upsamples, model.decoder.head)
    else:
        yield from (model.encoder.conv1, *model.encoder.downsamples, *model.encoder.middle)
        yield from (model.encoder.head, model.conv1)


def _inner(part: Any) -> list[Any]:
    """The modules that a part calls one by one, besides its shortcut; itself if there are none."""
    if isinstance(part, wan22.Up_ResidualBlock):
        return list(part.upsamples)
    return list(part.downsamples) if isinstance(part, wan22.Down_ResidualBlock) else [part]


def _links(part: Any, model: Any) -> list[Link]:
    return [link for module in _inner(part) for link in _links_of(module, model)]


def _links_of(part: Any, model: Any) -> list[Link]:
    if isinstance(part, wan.CausalConv3d):
        is_point = part.kernel_size == (1, 1, 1)
        made = model.z_dim if part is model.conv1 else part.out_channels  # the mean alone
        return [Link("point" if is_point else "conv", part.in_channels, made)]
    if isinstance(part, nn.Sequential):
        conv: Any = part[-1]
        return [Link("conv", conv.in_channels, conv.out_channels)]
    if isinstance(part, _BLOCKS):
        return [Link("block", part.in_dim, part.out_dim)]
    if isinstance(part, wan.AttentionBlock):
        return [Link("attention", part.dim, part.dim)]
    conv = part.resample[1]
    here = [Link("up" if "up" in part.mode else "down", conv.in_channels, conv.out_channels)]
    if part.mode == "upsample3d":
        return [Link("time_up", part.dim, part.dim), *here]
    if part.mode == "downsample3d":
        return [*here, Link("time_down", part.dim, part.dim)]
    return here


def read(model: Any, like: torch.Tensor, *, is_decoder: bool) -> VideoLayers:
    """The layers of the decoder or encoder of a WanVAE for which `why_not` is None.

    Args:
        like: a tensor of the dtype and on the device of the arithmetic.
    """
    layers: list[AnyLayers] = []
    for part in _parts(model, is_decoder=is_decoder):
        for module in _inner(part):
            layers += _layers(module, model, like)
    return VideoLayers(layers, _convolve)


def _layers(part: Any, model: Any, like: torch.Tensor) -> list[AnyLayers]:
    def weights(layer: Any) -> Fetch:
        return lambda until: fetch_weights(layer, like, until)

    def conv(norm: Any, layer: Any) -> ConvLayers:
        return ConvLayers(_rms(norm), weights(layer))

    if isinstance(part, wan.CausalConv3d):
        if part.kernel_size == (1, 1, 1):
            return [PointLayers(weights(part), _links_of(part, model)[0].made)]
        return [ConvLayers(None, weights(part))]
    if isinstance(part, nn.Sequential):
        norm, _, last = part
        return [conv(norm, last)]
    if isinstance(part, _BLOCKS):
        norm1, _, conv1, norm2, _, _, conv2 = part.residual
        is_wider = part.in_dim != part.out_dim
        shortcut = weights(part.shortcut) if is_wider else None
        return [BlockLayers(conv(norm1, conv1), conv(norm2, conv2), shortcut)]
    if isinstance(part, wan.AttentionBlock):
        return [_attention(part, like)]
    spatial = ResampleLayers(weights(part.resample[1]))
    if part.mode == "upsample3d":
        return [ResampleLayers(weights(part.time_conv)), spatial]
    if part.mode == "downsample3d":
        return [spatial, ResampleLayers(weights(part.time_conv))]
    return [spatial]


def _rms(norm: Any) -> RmsLayer:
    return RmsLayer(norm.gamma.reshape(-1, 1, 1), norm.scale)


def _attention(block: Any, like: torch.Tensor) -> AttentionBlock:
    fetched: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def third(number: int) -> Fetch:
        part = slice(number * block.dim, (number + 1) * block.dim)

        def fetch(until: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
            # Once for the three of them, which are asked for one after the other.
            weight, bias = fetch_weights(block.to_qkv, like, until) if number == 0 else fetched[0]
            fetched[:] = [(weight, bias)] if number < 2 else []
            return weight[part], None if bias is None else bias[part]

        return fetch

    attend, most_queries = attend_with(like.device)
    layers = AttentionWeights(
        query=third(0),
        key=third(1),
        value=third(2),
        out=lambda until: fetch_weights(block.proj, like, until),
        attend=attend,
        most_queries=most_queries,
    )
    return AttentionBlock(_rms(block.norm), layers)


def _convolve(
    window: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    columns: int = 0,
    stride: int = 1,
) -> torch.Tensor:
    """A convolution of [1, C, F, n, W], by the kernel that the host takes for it."""
    strides, padding = (stride, 1, 1), (0, 0, columns)
    if comfy.ops.NVIDIA_MEMORY_CONV_BUG_WORKAROUND and weight.dtype in _HALF_TYPES:
        made = torch.cudnn_convolution(
            window, weight, padding, strides, (1, 1, 1), 1,
            benchmark=False, deterministic=False, allow_tf32=True,
        )  # fmt: skip
        return made if bias is None else made.add_(bias.reshape(1, -1, 1, 1, 1))
    return functional.conv3d(window, weight, bias, strides, padding)
