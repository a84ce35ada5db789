"""The layers of a causal video VAE, fed frame by frame with the rows of one strip.

Strip after strip, frame after frame: a layer gets the new rows of a frame and gives the rows of its
result that they complete. Two kinds of neighbours are kept instead of being computed again:

| kept | for | how long |
|---|---|---|
| the last rows of each frame's strip | the same frame in the strip below | until that strip |
| two frames of a strip before each causal convolution | its next frame | until the strip ends |

So the frames before, which the host keeps of the whole picture, exist for one strip only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch

from ..attention import Tick, attended_
from ..layers import Fetch
from ..strips import add_rows_, inner
from .cuts import first_needed
from .layers import (
    AttentionBlock,
    ConvLayers,
    Convolve,
)
from .rms import RmsSiLU
from .sizes import Kind

# Frames that a causal convolution reads, the newest of them last.
TAPS = 3


class Edges(NamedTuple):
    """Of each map of a layer, how many rows exist before a strip and after it."""

    done: Sequence[int]
    stops: Sequence[int]


class Step:
    """A layer."""

    def begin(self, edges: Edges) -> None:
        """Begins a strip, with its first frame."""

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """Takes the new rows of a frame, [1, C, n, W], from the list; returns frames made."""
        raise NotImplementedError


class Above:
    """The last rows of each frame, for the strip below.

    Memory: at most three rows of each frame.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind: Kind = kind
        self._rows: dict[int, torch.Tensor] = {}

    def joined(self, frame: int, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """The rows kept of a frame, if any, and the new ones."""
        kept = self._rows.pop(frame, None)
        return ([] if kept is None else [kept]) + [held.pop()]

    def keep(self, frame: int, parts: Sequence[torch.Tensor], stop: int, made: int) -> None:
        """Keeps of the rows, which end before `stop`, what results from row `made` on need."""
        count = stop - first_needed(self._kind, made)
        if count > 0:
            rows = [part for part in parts if part.shape[2]]
            last = rows[-1] if rows[-1].shape[2] >= count else torch.cat(rows, 2)
            self._rows[frame] = last[:, :, last.shape[2] - count :].clone()


class CausalConv:
    """A causal 3 x 3 x 3 convolution, of a map or of SiLU of its norm.

    Args:
        height: rows of the map.
        is_video: more frames than one come.

    Memory: a call holds a window of three frames (of the first frame, one) and its result. Between
        two calls, two frames of the window are held if it `is_video`.
    Exact: up to the order in which torch's kernel sums; the window is that of the whole picture.
    """

    def __init__(
        self, layers: ConvLayers, convolve: Convolve, until: ExitStack, height: int, is_video: bool
    ) -> None:
        self._norm = None if layers.norm is None else RmsSiLU(layers.norm)
        self._weight, self._bias = layers.conv(until)
        self._convolve, self._height, self._is_video = convolve, height, is_video
        self._before: torch.Tensor | None = None

    def begin(self) -> None:
        self._before = None

    def of(self, parts: list[torch.Tensor], first: int, last: int) -> torch.Tensor:
        """Rows first to last - 1 of the result, [1, C_out, n, W].

        Args:
            parts: the rows first - 1 to last of the frame that exist; the list is emptied.
        """
        _, channels, _, width = parts[0].shape
        if last == first:
            parts.clear()
            return self._weight.new_empty(1, self._weight.shape[0], 0, width)
        taps = 1 if self._before is None else TAPS
        window = parts[0].new_empty(1, channels, taps, last - first + 2, width)
        if self._before is not None:
            window[:, :, :-1].copy_(self._before)
        newest = window[:, :, -1]
        # Outside of the picture a convolution reads zeros: of its own input, behind the norm.
        top, bottom = int(first == 0), newest.shape[2] - int(last == self._height)
        newest[:, :, :top].zero_()
        newest[:, :, bottom:].zero_()
        if self._norm is None:
            copy_rows(parts, newest[:, :, top:bottom])
        else:
            self._norm.write(parts, newest[:, :, top:bottom])
        made = self._convolve(window, self._weight[:, :, -taps:], self._bias, columns=1)
        if self._is_video and self._before is None:
            before = window.new_zeros(1, channels, TAPS - 1, *newest.shape[2:])
            before[:, :, -1].copy_(newest)
            self._before = before
        elif self._before is not None:
            self._before.copy_(window[:, :, 1:])
        return made[:, :, 0]


def copy_rows(parts: list[torch.Tensor], into: torch.Tensor) -> None:
    """Copies the rows of several strips into one; empties the list."""
    done = 0
    while parts:
        rows = parts.pop(0)
        into[:, :, done : done + rows.shape[2]].copy_(rows)
        done += rows.shape[2]


class Conv(Step):
    """A causal 3 x 3 x 3 convolution with what it keeps of the strip above."""

    def __init__(self, conv: CausalConv) -> None:
        self._conv, self._above = conv, Above("conv")

    def begin(self, edges: Edges) -> None:
        self._frame, self._edges = -1, edges
        self._conv.begin()

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        self._frame += 1
        (_, done), (stop, made) = self._edges
        parts = self._above.joined(self._frame, held)
        if made < self._conv._height:
            self._above.keep(self._frame, parts, stop, made)
        return [self._conv.of(parts, done, made)]


class Block(Step):
    """x + conv(silu(norm(conv(silu(norm(x)))))).

    Memory: a call holds x, the hidden rows or the result, and the window of a convolution.
    """

    def __init__(
        self, first: CausalConv, second: CausalConv, shortcut: Point | None, height: int
    ) -> None:
        self._first, self._second, self._shortcut, self._height = first, second, shortcut, height
        self._given, self._hidden = Above("conv"), Above("conv")

    def begin(self, edges: Edges) -> None:
        self._frame, self._edges = -1, edges
        self._first.begin()
        self._second.begin()

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        self._frame += 1
        frame = self._frame
        (_, mid, first), (given, middle, last) = self._edges
        parts = self._given.joined(frame, held)
        top = given - sum(part.shape[2] for part in parts)
        skips = inner(parts, first - top, last - top)
        if last < self._height:
            # The sum needs no rows above those of the first convolution.
            self._given.keep(frame, parts, given, middle)
        hidden = [self._first.of(parts, mid, middle)]
        rows = self._hidden.joined(frame, hidden)
        if last < self._height:
            self._hidden.keep(frame, rows, middle, last)
        made = self._second.of(rows, first, last)
        if self._shortcut is not None:
            skips = [self._shortcut.of(part) for part in skips]
        add_rows_(made, skips)
        return [made]


class Point(Step):
    """A 1 x 1 x 1 convolution.

    Args:
        channels: of the result, the first that the layer makes; None: all.
    """

    def __init__(
        self, fetch: Fetch, convolve: Convolve, until: ExitStack, channels: int | None = None
    ) -> None:
        weight, bias = fetch(until)
        self._weight = weight[:channels]
        self._bias = None if bias is None else bias[:channels]
        self._convolve = convolve

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.of(held.pop())]

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        if not rows.shape[2]:
            return rows.new_empty(1, self._weight.shape[0], 0, rows.shape[3])
        return self._convolve(rows[:, :, None], self._weight, self._bias)[:, :, 0]


class Attention(Step):
    """The attention of each frame with itself; it gets whole frames."""

    def __init__(self, block: AttentionBlock, until: ExitStack, tick: Tick) -> None:
        self._norm, self._until, self._tick = RmsSiLU(block.norm), until, tick
        layers = block.layers
        # Fetched once, not for each frame: what is borrowed stays until the stack closes.
        query, key = layers.query(until), layers.key(until)
        value, out = layers.value(until), layers.out(until)
        self._layers = replace(
            layers,
            query=lambda _: query,
            key=lambda _: key,
            value=lambda _: value,
            out=lambda _: out,
        )

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        made = attended_(held, self._normed, self._layers, self._until, self._tick)
        return [made.contiguous()]

    def _normed(self, rows: torch.Tensor) -> torch.Tensor:
        # In float32, torch sums in another order where the channels lie last.
        return self._norm.norm(rows.contiguous())
