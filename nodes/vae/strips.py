"""Convolutions over strips of rows.

A stage takes the strips of a map in order and returns those of the next map, one or two rows
behind. It keeps the rows that the next strip's convolution needs. So no row is computed twice, and
the result is that of the whole map. `push` returns None while it has no row to return.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from .cuts import HALO_ROWS
from .devices import layout

# Writes what is convolved of a strip into another tensor of the same shape.
WriteFn = Callable[[torch.Tensor, torch.Tensor], None]


class Stage(Protocol):
    """Strips [1, C_in, n, W_in] in, strips [1, C_out, m, W_out] out."""

    def push(self, rows: torch.Tensor) -> torch.Tensor | None: ...


def copy_rows(rows: torch.Tensor, into: torch.Tensor) -> None:
    """A `WriteFn` that changes nothing."""
    into.copy_(rows)


class Halo:
    """Adds to each strip the two rows above it, and zeros beyond the map's edges.

    Args:
        height: rows of the whole map.
        write: fills a window with a strip.

    Memory: two rows between calls.
    """

    def __init__(self, height: int, write: WriteFn = copy_rows) -> None:
        self._left, self._write = height, write
        self._carry: torch.Tensor | None = None

    def window(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The strip [1, C, n, W] with its halo, [1, C, n + 1 to n + 3, W]; None if 2 rows or less.

        Raises:
            ValueError: more rows than the map has.
        """
        _, channels, count, width = rows.shape
        self._left -= count
        if self._left < 0:
            raise ValueError(f"the map has {-self._left} rows less than it was given")
        above, below = 1 if self._carry is None else HALO_ROWS, int(self._left == 0)
        window = torch.empty(
            (1, channels, above + count + below, width),
            dtype=rows.dtype, device=rows.device, memory_format=layout(rows.device),
        )  # fmt: skip
        if self._carry is None:
            window[:, :, :1].zero_()
        else:
            window[:, :, :HALO_ROWS].copy_(self._carry)
        self._write(rows, window[:, :, above : above + count])
        if below:
            window[:, :, -1:].zero_()
        self._carry = None if below else window[:, :, -HALO_ROWS:].clone()
        return window if window.shape[2] > HALO_ROWS else None


class Conv:
    """A 3 x 3 convolution with a padding of 1, one row behind.

    Args:
        weight: [C_out, C_in, 3, 3], float.
        bias: [C_out], float, or None.
        height: rows of the map.
        write: what is done to a strip first, such as `NormSiLU.write`; the padding stays zero.

    Memory: a call holds its input, the window of n + 2 rows and its output.
    Exact: equal up to rounding to the convolution of the whole map.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        height: int,
        write: WriteFn = copy_rows,
    ) -> None:
        self._weight = weight.contiguous(memory_format=layout(weight.device))
        self._bias, self._halo = bias, Halo(height, write)

    def push(self, rows: torch.Tensor) -> torch.Tensor | None:
        window = self._halo.window(rows)
        del rows  # the last owner of a strip is the stage it was pushed into
        if window is None:
            return None
        return functional.conv2d(window, self._weight, self._bias, padding=(0, 1))


class RowQueue:
    """Strips that wait for the rows of a later stage.

    Memory: the strips not yet taken; of a strip taken in part, the rest.
    """

    def __init__(self) -> None:
        self._parts: deque[torch.Tensor] = deque()
        self.rows = 0

    def put(self, rows: torch.Tensor) -> None:
        self._parts.append(rows)
        self.rows += rows.shape[2]

    def add_to_(self, rows: torch.Tensor) -> None:
        """Adds the next rows to a strip [1, C, n, W], in place.

        Raises:
            ValueError: fewer rows wait.
        """
        count, done = rows.shape[2], 0
        if count > self.rows:
            raise ValueError(f"{count} rows are wanted, {self.rows} wait")
        self.rows -= count
        while done < count:
            part = self._parts.popleft()
            taken = min(part.shape[2], count - done)
            rows[:, :, done : done + taken].add_(part[:, :, :taken])
            done += taken
            rest = part[:, :, taken:]
            if rest.shape[2]:
                # A view would keep the whole strip.
                short = rest.shape[2] <= taken
                self._parts.appendleft(rest.clone() if short else rest)


class Pointwise:
    """A 1 x 1 convolution as a stage."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def push(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(rows, self._weight, self._bias)


class ResBlock:
    """x + conv(silu(norm(conv(silu(norm(x)))))), both norms' statistics given; two rows behind.

    Args:
        first: the first norm, SiLU and convolution.
        second: the second.
        shortcut: the 1 x 1 convolution on x where the channels change.

    Memory: a call holds x, and the larger of `first`'s call and `second`'s with the hidden strip.
    Exact: equal up to rounding to the block on the whole map.
    """

    def __init__(self, first: Conv, second: Conv, shortcut: Pointwise | None) -> None:
        self._first, self._second, self._shortcut = first, second, shortcut
        self._waiting = RowQueue()

    def push(self, rows: torch.Tensor) -> torch.Tensor | None:
        hidden = self._first.push(rows)
        self._waiting.put(rows if self._shortcut is None else self._shortcut.push(rows))
        del rows
        if hidden is None:
            return None
        handed = [hidden]
        del hidden  # the last owner of a strip is the stage it is pushed into
        made = self._second.push(handed.pop())
        if made is not None:
            self._waiting.add_to_(made)
        return made
