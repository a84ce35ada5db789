"""The step of each layer of a causal video VAE."""

from __future__ import annotations

from contextlib import ExitStack

from ..attention import Tick
from .layers import AnyLayers, AttentionBlock, BlockLayers, ConvLayers, Convolve, PointLayers
from .resample import Down, TimeDown, TimeUp, Up
from .sizes import Kind
from .step import Attention, Block, CausalConv, Conv, Point, Step


def made_step(
    kind: Kind,
    layers: AnyLayers,
    convolve: Convolve,
    until: ExitStack,
    *,
    height: int,
    is_video: bool,
    tick: Tick,
) -> Step:
    """The step of a layer, whose weights it borrows until the stack closes.

    Args:
        height: rows of its input.
        is_video: more frames than one come.
        tick: see `Attention`.
    """

    def conv(part: ConvLayers) -> CausalConv:
        return CausalConv(part, convolve, until, height, is_video)

    if isinstance(layers, PointLayers):
        return Point(layers.conv, convolve, until, layers.channels)
    if isinstance(layers, ConvLayers):
        return Conv(conv(layers))
    if isinstance(layers, AttentionBlock):
        return Attention(layers, until, tick)
    if isinstance(layers, BlockLayers):
        shortcut = None
        if layers.shortcut is not None:
            shortcut = Point(layers.shortcut, convolve, until)
        return Block(conv(layers.first), conv(layers.second), shortcut, height)
    if kind == "time_up":
        return TimeUp(layers, convolve, until)
    if kind == "time_down":
        return TimeDown(layers, convolve, until)
    return (Up if kind == "up" else Down)(layers, until, height)
