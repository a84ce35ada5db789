"""The layers of a causal video VAE that change a map's sides or its number of frames.

As those of step.py, fed frame by frame with the rows of one strip.
"""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch.nn import functional

from ..strips import inner
from .layers import Convolve, ResampleLayers
from .sizes import Kind
from .step import TAPS, Above, Edges, Step, copy_rows


class _Spatial(Step):
    """A 3 x 3 convolution that changes a map's sides.

    Args:
        height: rows of the result.
    """

    def __init__(self, layers: ResampleLayers, until: ExitStack, height: int, kind: Kind) -> None:
        self._weight, self._bias = layers.conv(until)
        self._height, self._above = height, Above(kind)

    def begin(self, edges: Edges) -> None:
        self._frame, self._edges = -1, edges

    def _taken(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        """The next frame's rows, with those above them; those for the strip below are kept."""
        self._frame += 1
        _, (stop, last) = self._edges
        parts = self._above.joined(self._frame, held)
        if last < self._height:
            self._above.keep(self._frame, parts, stop, last)
        return parts


class Up(_Spatial):
    """Nearest upsampling by 2 and a 3 x 3 convolution.

    Memory: a call holds its rows, those upsampled, and its result.
    """

    def __init__(self, layers: ResampleLayers, until: ExitStack, height: int) -> None:
        super().__init__(layers, until, 2 * height, "up")

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        parts = self._taken(held)
        (_, first), (stop, last) = self._edges
        _, channels, _, width = parts[0].shape
        if last == first:
            return [parts[0].new_empty(1, self._weight.shape[0], 0, 2 * width)]
        window = parts[0].new_empty(1, channels, last - first + 2, 2 * width)
        top = first - 1  # the window's first row, of the upsampled map
        if first == 0:
            window[:, :, 0].zero_()
        if last == self._height:
            window[:, :, -1].zero_()
        source = stop - sum(part.shape[2] for part in parts)
        while parts:
            for row in (0, 1):  # of the two that each row becomes
                _upsample(parts[0], 2 * source + row - top, window)
            source += parts.pop(0).shape[2]
        return [functional.conv2d(window, self._weight, self._bias, padding=(0, 1))]


def _upsample(rows: torch.Tensor, start: int, window: torch.Tensor) -> None:
    """Writes each row, its columns doubled, into every second row of the window from `start` on."""
    into, doubled = every_second(rows, start, window)
    into.copy_(doubled)


def every_second(
    rows: torch.Tensor, start: int, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every second row of the window from `start` on, and the rows for them, columns doubled.

    Both are views [1, C, n, W, 2]. Rows for which the window has no place are left out.
    """
    skipped = max(0, -start + 1) // 2
    into = window[:, :, start + 2 * skipped :: 2]
    rows = rows[:, :, skipped : skipped + into.shape[2]]
    into = into[:, :, : rows.shape[2]].unflatten(3, (-1, 2))
    return into, rows[..., None].expand_as(into)


class Down(_Spatial):
    """A 3 x 3 convolution of stride 2, which reads a row and a column of zeros at the end.

    Memory: a call holds its rows, a copy of them with the zeros, and its result.
    """

    def __init__(self, layers: ResampleLayers, until: ExitStack, height: int) -> None:
        super().__init__(layers, until, height // 2, "down")

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        parts = self._taken(held)
        (_, first), (_, last) = self._edges
        _, channels, _, width = parts[0].shape
        if last == first:
            return [parts[0].new_empty(1, self._weight.shape[0], 0, width // 2)]
        window = parts[0].new_zeros(1, channels, 2 * (last - first) + 1, width + 1)
        given = sum(part.shape[2] for part in parts)
        copy_rows(inner(parts, 0, min(given, window.shape[2])), window[..., :-1])
        parts.clear()
        return [functional.conv2d(window, self._weight, self._bias, stride=2)]


class TimeUp(Step):
    """A causal 3 x 1 x 1 convolution that makes two frames of each but the first.

    The first frame is not among those that it reads.
    """

    def __init__(self, layers: ResampleLayers, convolve: Convolve, until: ExitStack) -> None:
        self._weight, self._bias = layers.conv(until)
        self._convolve = convolve

    def begin(self, edges: Edges) -> None:
        self._frame, self._before = -1, None

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        self._frame += 1
        if self._frame == 0:
            return [held.pop()]
        rows = held.pop()
        _, channels, count, width = rows.shape
        if not count:
            return [rows, rows]
        taps = 1 if self._before is None else TAPS
        window = rows.new_empty(1, channels, taps, count, width)
        if self._before is not None:
            window[:, :, :-1].copy_(self._before)
        window[:, :, -1].copy_(rows)
        del rows
        made = self._convolve(window, self._weight[:, :, -taps:], self._bias)[:, :, 0]
        if self._before is None:
            self._before = window.new_zeros(1, channels, TAPS - 1, count, width)
            self._before[:, :, -1].copy_(window[:, :, -1])
        else:
            self._before.copy_(window[:, :, 1:])
        return list(made.chunk(2, 1))


class TimeDown(Step):
    """A 3 x 1 x 1 convolution of stride 2 in time: of each even frame and the two before it.

    The first frame stays as it is.
    """

    def __init__(self, layers: ResampleLayers, convolve: Convolve, until: ExitStack) -> None:
        self._weight, self._bias = layers.conv(until)
        self._convolve = convolve

    def begin(self, edges: Edges) -> None:
        self._frames: list[torch.Tensor] = []

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        self._frames.append(held.pop())
        newest = self._frames[-1]
        if len(self._frames) == 1:
            return [newest]
        if len(self._frames) < TAPS:
            return []
        if not newest.shape[2]:
            self._frames = [newest]
            return [newest]
        window = torch.stack(self._frames, 2)
        self._frames = [newest]
        return [self._convolve(window, self._weight, self._bias)[:, :, 0]]
