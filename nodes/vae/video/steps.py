"""The step of each layer of a causal video VAE."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from ..attention import Tick
from .cuts import row_kinds
from .layers import (
    AnyLayers,
    AttentionBlock,
    BlockLayers,
    ConvLayers,
    Convolve,
    PointLayers,
)
from .resample import Down, TimeDown, TimeUp, Up
from .shortcut import Fork, Join, Path
from .sizes import Kind, Part, frames_made
from .step import Attention, Block, CausalConv, Conv, Edges, Point, Step


class PlacedStep(NamedTuple):
    """A step, and the numbers of its first and last map in the chain."""

    step: Step
    first: int
    last: int

    def begin(self, done: Sequence[int], stops: Sequence[int]) -> None:
        """Begins a strip; see `Edges`, here of all maps of the chain."""
        maps = slice(self.first, self.last + 1)
        self.step.begin(Edges(done[maps], stops[maps]))


def made_steps(
    part: Part,
    layers: Sequence[AnyLayers],
    convolve: Convolve,
    until: ExitStack,
    *,
    heights: Sequence[int],
    frames: int,
    tick: Tick,
) -> list[PlacedStep]:
    """The steps of a part of the chain in the order of their calls, shortcuts among them.

    Args:
        heights: rows of each map.
        frames: of the part's input.
    """
    place, places = 0, [0]
    for link in part.links:
        place += len(row_kinds([link]))
        places.append(place)
    paths = [(Path(short), short) for short in part.shortcuts]
    found: list[PlacedStep] = []
    for number, (link, of_link) in enumerate(zip(part.links, layers, strict=True)):
        for path, short in paths:
            if short.first == number:
                found.append(PlacedStep(Fork(path), places[number], places[short.last]))
        step = made_step(
            link.kind,
            of_link,
            convolve,
            until,
            height=heights[places[number]],
            is_video=frames > 1,
            tick=tick,
        )
        found.append(PlacedStep(step, places[number], places[number + 1]))
        for path, short in paths:
            if short.last == number + 1:
                found.append(PlacedStep(Join(path), places[number + 1], places[number + 1]))
        frames = frames_made(link.kind, frames)
    return found


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
