"""Convolutions that make any rows of a map.

A stage makes rows of its result from the rows of its source that they depend on, and keeps nothing
between two calls. So strips may have any size, and the result is that of the whole map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from .devices import layout
from .statistics import NormSiLU

# Gives the rows from the first to before the last, [1, C, n, W], in one tensor or several, in a
# list of the caller's. Rows above the third number will not be asked for again.
ReadFn = Callable[[int, int, int], "list[torch.Tensor]"]


class Stage(Protocol):
    """Makes rows first to last - 1 of a map, [1, C, n, W], from those of another that it reads."""

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor: ...


def kept(keep: int, reach: int, height: int) -> int:
    """The first row that a reader of a map needs later, for results from row `keep` on.

    Args:
        keep: `height` where none will be asked for.
        reach: how many rows above it a result depends on.
    """
    return height if keep >= height else keep - reach


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """The rows of several strips as one; empties the list."""
    rows = parts.pop() if len(parts) == 1 else torch.cat(parts, 2)
    parts.clear()
    # What comes from RAM is channels last.
    return rows.contiguous() if layout(rows.device) is torch.contiguous_format else rows


def convolved(
    window: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    is_above: bool,
    is_below: bool,
) -> torch.Tensor:
    """A 3 x 3 convolution with a padding of 1 in rows whose neighbours lie in the window too.

    Args:
        window: [1, C, n, W].
        is_above: its first row is such a neighbour, not the first row of the map.
        is_below: likewise its last row.
    """
    if is_above and is_below:
        return functional.conv2d(window, weight, bias, padding=(0, 1))
    # The row at the other end comes out wrong.
    made = functional.conv2d(window, weight, bias, padding=1)
    return made[:, :, int(is_above) : made.shape[2] - int(is_below)]


class Conv:
    """A 3 x 3 convolution with a padding of 1, of the map or of its SiLU after the norm.

    Args:
        weight: [C_out, C_in, 3, 3], float.
        bias: [C_out], float, or None.
        height: rows of the map.
        norm: None convolves the map itself.
        is_fresh: what is read may be normed in place.

    Memory: a call holds the rows that it reads, with `norm` and unless they are fresh a copy of
        them, and its result.
    Exact: equal up to rounding to the convolution of the whole map.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        height: int,
        norm: NormSiLU | None = None,
        is_fresh: bool = False,
    ) -> None:
        self._weight = weight.contiguous(memory_format=layout(weight.device))
        self._bias, self.height, self._norm, self._is_fresh = bias, height, norm, is_fresh

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor:
        keep = kept(keep, 1, self.height)
        parts = read(max(first - 1, 0), min(last + 1, self.height), keep)
        return self.of(parts, first, last, is_fresh=self._is_fresh)

    def of(
        self, parts: list[torch.Tensor], first: int, last: int, *, is_fresh: bool
    ) -> torch.Tensor:
        """As `make`, from the rows that it would read; empties the list."""
        norm = self._norm
        window = joined(parts) if norm is None else _normed(parts, norm, is_fresh=is_fresh)
        return convolved(
            window, self._weight, self._bias, is_above=first > 0, is_below=last < self.height
        )


def _normed(parts: list[torch.Tensor], norm: NormSiLU, *, is_fresh: bool) -> torch.Tensor:
    """The normed rows of several strips as one; empties the list."""
    one, way = parts[0], layout(parts[0].device)
    if is_fresh and len(parts) == 1 and one.is_contiguous(memory_format=way):
        window = one
    else:
        _, channels, _, width = one.shape
        window = torch.empty(
            (1, channels, sum(part.shape[2] for part in parts), width),
            dtype=one.dtype, device=one.device, memory_format=way,
        )  # fmt: skip
    del one
    norm.write(parts, window)
    return window


class Beside(NamedTuple):
    """What is made of a block's source beside its first convolution.

    made: gives it for the rows of a strip, which it takes from the list.
    below: how many rows below the strip it needs.
    """

    made: Callable[[list[torch.Tensor]], torch.Tensor]
    below: int


class Pointwise:
    """A 1 x 1 convolution."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor:
        return self.of(read(first, last, keep))

    def of(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """As `make`, from the rows that it would read; empties the list."""
        return functional.conv2d(joined(parts), self._weight, self._bias)


class ResBlock:
    """x + conv(silu(norm(conv(silu(norm(x)))))), both norms' statistics given.

    Args:
        first: the first norm, SiLU and convolution.
        second: the second.
        shortcut: the 1 x 1 convolution on x where the channels change.
        is_fresh: x may be written into.

    Memory: a call holds x and `first`'s call, which norms x in place if there is a shortcut and x
        is fresh; then x or its shortcut, the hidden rows, and the result.
    Exact: equal up to rounding to the block on the whole map.
    """

    def __init__(
        self, first: Conv, second: Conv, shortcut: Pointwise | None, *, is_fresh: bool
    ) -> None:
        self._first, self._second, self._shortcut = first, second, shortcut
        self._is_fresh = is_fresh

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor:
        height = self._first.height
        above, below = max(first - 1, 0), min(last + 1, height)
        top = max(above - 1, 0)
        parts = read(top, min(below + 1, height), kept(keep, 2, height))
        skips = inner(parts, first - top, last - top)
        is_fresh = self._is_fresh and self._shortcut is not None
        if self._shortcut is not None:
            skips.append(self._shortcut.of(skips))
        hidden = [self._first.of(parts, above, below, is_fresh=is_fresh)]
        made = self._second.of(hidden, first, last, is_fresh=True)
        add_rows_(made, skips)
        return made


def inner(parts: list[torch.Tensor], first: int, last: int) -> list[torch.Tensor]:
    """Views of some of the rows of several strips."""
    found, start = [], 0
    for part in parts:
        stop = start + part.shape[2]
        if start < last and stop > first:
            found.append(part[:, :, max(first - start, 0) : last - start])
        start = stop
    return found


def add_rows_(rows: torch.Tensor, parts: list[torch.Tensor]) -> None:
    """Adds to a strip what lies in several, in place; empties the list."""
    done = 0
    while parts:
        part = parts.pop(0)
        rows[:, :, done : done + part.shape[2]].add_(part)
        done += part.shape[2]
