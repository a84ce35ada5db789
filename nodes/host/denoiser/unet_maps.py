"""The U-Nets' parts that are no transformer: ResBlock and Upsample by strips of rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.ops
import torch
from torch import nn
from torch.nn import functional

from ...denoiser.maps import ConvolveFn, convolve_strips, write_normed, write_upsampled
from ...denoiser.unet_cuts import strip_rows
from ..base.fetch import fetch_weights, is_plain
from .replaced import IntoNew, OnHandover, is_stock

_PLAIN = comfy.ops.disable_weight_init


class _ResBlock(openaimodel.ResBlock):
    """So that the host hands over the timestep, and patches by class find the part."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class _Upsample(openaimodel.Upsample):
    """So that the host hands over the shape that is wanted."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def is_known_res_block(part: Any) -> bool:
    """True for a ResBlock without resampling, that adds the timestep's embedding."""
    return (
        type(part) is openaimodel.ResBlock
        and not part.updown
        and not part.use_scale_shift_norm
        and not part.exchange_temb_dims
        and not part.skip_t_emb
    )


def is_known_upsample(part: Any) -> bool:
    """True for an Upsample of maps, with a convolution."""
    return type(part) is openaimodel.Upsample and part.dims == 2 and part.use_conv


class LeanResBlock(IntoNew, _ResBlock):
    """A ResBlock whose norms become SiLU in place; its first norm exists `strips` times smaller.

    strips: 1 holds it whole.
    """

    STREAMS = ("x",)
    KNOWN = ("emb",)

    def __init__(self, block: Any, strips: int, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.strips = strips

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        return super().why_not(given) if self._is_untouched() else "another node changed a ResBlock"

    def _is_untouched(self) -> bool:
        (block,) = self.stock
        nets = (block.in_layers, block.out_layers)
        dropout = block.out_layers[2]
        return (
            is_stock(block, openaimodel.ResBlock)
            and "_forward" not in vars(block)
            and all(is_stock(net, nn.Sequential) and is_stock(net[1], nn.SiLU) for net in nets)
            and [len(net) for net in nets] == [3, 4]
            and all(is_plain(net[0], _PLAIN.GroupNorm) for net in nets)
            and all(is_plain(net[-1], _PLAIN.Conv2d) for net in nets)  # a hook may keep a result
            and is_stock(dropout, nn.Dropout)
            and (dropout.p == 0 or not dropout.training)
        )

    def run(self, *, x, emb, **_):
        (block,) = self.stock
        norm, _, conv = block.in_layers
        is_cut = len(strip_rows(x.shape[2], x.shape[3], self.strips)) > 1 and _pads_alike(conv)
        h = self._cut(x, norm, conv) if is_cut else conv(_silu_of(norm, x))
        added = block.emb_layers(emb).type(h.dtype)
        h.add_(added[..., None, None])
        norm, *_, conv = block.out_layers
        normed = _silu_of(norm, h)
        del h  # before the convolution allocates
        h = conv(normed)
        del normed
        if is_stock(block.skip_connection, nn.Identity):
            return h.add_(x)
        return torch.add(block.skip_connection(x), h, out=h)

    def _cut(self, x: torch.Tensor, norm: Any, conv: Any) -> torch.Tensor:
        with ExitStack() as until:
            weight, bias = fetch_weights(norm, x, until)
            convolve = _convolution(conv, x, until)
            h = x.new_empty(x.shape[0], conv.out_channels, *x.shape[2:])
            for source, into in zip(x, h, strict=True):
                write = functools.partial(
                    write_normed, source, norm.num_groups, weight, bias, norm.eps
                )
                convolve_strips(write, x.shape[1], into, convolve, strips=self.strips)
        return h


class LeanUpsample(IntoNew, _Upsample):
    """An Upsample whose doubled map exists `strips` times smaller."""

    STREAMS = ("x",)
    KNOWN = ("output_shape",)

    def __init__(self, block: Any, strips: int, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.strips = strips

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        (block,) = self.stock
        if not is_stock(block, openaimodel.Upsample) or not _pads_alike(block.conv):
            return "another node changed an Upsample"
        x = given["x"]
        sides = zip(x.shape[2:], _upsampled(x, given.get("output_shape")), strict=True)
        if any(2 * before - after not in (0, 1) for before, after in sides):
            return "a map is not upsampled to twice its size"
        return super().why_not(given)

    def run(self, *, x, output_shape=None, **_):
        (block,) = self.stock
        conv = block.conv
        height, width = _upsampled(x, output_shape)
        if len(strip_rows(height, width, self.strips)) == 1:
            return block(x, output_shape=output_shape)
        with ExitStack() as until:
            convolve = _convolution(conv, x, until)
            made = x.new_empty(x.shape[0], conv.out_channels, height, width)
            for source, into in zip(x, made, strict=True):
                write = functools.partial(write_upsampled, source)
                convolve_strips(write, x.shape[1], into, convolve, strips=self.strips)
        return made


def _upsampled(x: torch.Tensor, output_shape: Sequence[int] | None) -> Sequence[int]:
    """Height and width; a skip tensor of an odd side asks for one less than twice."""
    return [2 * side for side in x.shape[2:]] if output_shape is None else output_shape[2:]


def _silu_of(norm: Any, rows: torch.Tensor) -> torch.Tensor:
    return functional.silu(norm(rows), inplace=True)


def _pads_alike(conv: Any) -> bool:
    """True for a convolution that strips of rows can take, as the host's U-Nets have it."""
    return (
        is_plain(conv, _PLAIN.Conv2d)
        and "_conv_forward" not in vars(conv)
        and conv.padding_mode == "zeros"
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
    )


def _convolution(conv: Any, like: torch.Tensor, until: ExitStack) -> ConvolveFn:
    weight, bias = fetch_weights(conv, like, until)
    return lambda strip: functional.conv2d(strip, weight, bias, padding=(0, 1))
