"""Maps from which rows are read: stored on the device, stored in RAM, or recomputed.

A reader asks for runs of rows from top to bottom. A convolution asks for the rows above and below
its strip too, so runs overlap by a few rows, which are recomputed where a map is not stored. The
last reader passes `drain=True`: what it has read is then freed, while the next map is written. So
whoever hands rows on keeps no name for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, Protocol

import torch

from .cuts import HALO_ROWS
from .ram import Ram, RamStrip
from .strips import ReadFn, Stage, add_rows_

# Shares of a strip that are copied as its rest: while the strip is at work, and with the next one.
_SHORT_SHARE, _NEXT_SHARE = 0.05, 0.5


class Rows(Protocol):
    """A map [1, C, height, width].

    limit: rows of a strip that a reader of the whole map should ask for.
    is_fresh: rows are made at each reading, so that the reader may write into them.
    """

    height: int
    width: int
    channels: int
    limit: int
    is_fresh: bool

    def open(self, until: ExitStack, *, drain: bool) -> ReadFn:
        """Begins a reading, for which weights may be borrowed until the stack closes."""
        ...


class Whole:
    """A map that is a tensor [1, C, H, W], read as views; the caller keeps it."""

    is_fresh = False

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        _, self.channels, self.height, self.width = rows.shape
        self.limit = self.height

    def open(self, until: ExitStack, *, drain: bool) -> ReadFn:
        return lambda first, last, keep: [self._rows[:, :, first:last]]


class _Piece(NamedTuple):
    """Rows start to stop of a map."""

    start: int
    stop: int
    rows: torch.Tensor | RamStrip


class Stored:
    """A map of `height` rows, of which `missing` are still to be appended.

    Args:
        height: rows of the map that will be appended.
        limit: rows of a strip that a reader should ask for.
        ram: where the strips wait; None keeps them on the device.
        is_one: copies the strips into one tensor, so that runs are views of it.

    Memory: the map, less what was drained: at most one strip more. In RAM: nothing on the device.
    """

    def __init__(
        self, height: int, limit: int, *, ram: Ram | None = None, is_one: bool = False
    ) -> None:
        self.height, self.width, self.channels, self.limit = height, 0, 0, limit
        self.is_fresh = ram is not None
        self._ram, self._is_one = ram, is_one
        self._pieces: deque[_Piece] = deque()
        self.missing, self._is_drained = height, False

    def append(self, rows: torch.Tensor) -> None:
        """Stores the next strip, [1, C, n, W]; the caller must not write into it any more.

        Raises:
            ValueError: more rows than the map has.
        """
        _, self.channels, count, self.width = rows.shape
        start = self.height - self.missing
        self.missing -= count
        if self.missing < 0:
            raise ValueError(f"the map has {-self.missing} rows less than were appended")
        if self._ram is not None:
            self._pieces.append(_Piece(start, start + count, self._ram.keep(rows)))
        elif not self._is_one:
            self._pieces.append(_Piece(start, start + count, rows))
        else:
            if not self._pieces:
                whole = _empty_like(rows, self.height)
                self._pieces.append(_Piece(0, self.height, whole))
            self.on_device()[0][:, :, start : start + count].copy_(rows)

    def on_device(self) -> list[torch.Tensor]:
        """The strips that are on the device, for a caller that may write into them."""
        return [piece.rows for piece in self._pieces if isinstance(piece.rows, torch.Tensor)]

    def open(self, until: ExitStack, *, drain: bool) -> ReadFn:
        """See `Rows`.

        Raises:
            ValueError: the map is not complete, or was drained.
        """
        if self.missing or self._is_drained:
            raise ValueError(f"a map of {self.height} rows is not complete or was drained")
        self._is_drained = drain
        held = self._pieces
        self._pieces = deque() if drain else held.copy()

        def read(first: int, last: int, keep: int) -> list[torch.Tensor]:
            if drain and not self._is_one:
                _shorten(held, first, _NEXT_SHARE)
            found = _found(held, first, last)
            while drain and held and held[0].stop <= keep:
                rows = held.popleft().rows
                if isinstance(rows, RamStrip):
                    rows.free()
                del rows
            if drain and not self._is_one:
                _shorten(held, keep, _SHORT_SHARE)
            return found

        return read


def _shorten(held: deque[_Piece], keep: int, share: float) -> None:
    """Copies the rest of a strip of which no more than a share is left: a view keeps it all.

    While the strip is at work, the copy is held besides: so a large rest waits for the next one.
    """
    if held and held[0].start < keep < held[0].stop:
        start, stop, rows = held[0]
        if isinstance(rows, torch.Tensor) and stop - keep <= share * (stop - start) + HALO_ROWS:
            held[0] = _Piece(keep, stop, rows[:, :, keep - start :].clone())


def _found(held: deque[_Piece], first: int, last: int) -> list[torch.Tensor]:
    hits = [piece for piece in held if piece.start < last and piece.stop > first]
    found: list[torch.Tensor] = []
    into = None
    for start, stop, rows in hits:
        run = max(first, start), min(last, stop)
        if isinstance(rows, torch.Tensor):
            found.append(rows[:, :, run[0] - start : run[1] - start])
        else:  # all on the card in one tensor
            into = rows.empty(last - first) if into is None else into
            rows.copy_to(into[:, :, run[0] - first : run[1] - first], run[0] - start)
    return found if into is None else [into]


def _empty_like(rows: torch.Tensor, height: int) -> torch.Tensor:
    """A tensor of so many rows, in the memory format of [1, C, n, W]."""
    _, channels, _, width = rows.shape
    is_last = rows.is_contiguous(memory_format=torch.channels_last)
    way = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty(
        (1, channels, height, width), dtype=rows.dtype, device=rows.device, memory_format=way
    )


class Piped:
    """A map that is recomputed at each reading: another map's rows through a stage.

    Args:
        source: the map to read.
        open_stage: makes the stage for one reading. It gets a stack, until whose end it may borrow
            weights, and whether this is the last reading.
        channels: of the result.
        limit: rows of a strip of the result.
        scale: rows of the result per row of the source: 1, 2, or 0.5.
        carries: keeps the rows that the next run needs again, so that none is computed twice.

    Memory: what reading the source holds, and the stage; with `carries` a few rows between runs.
    """

    def __init__(
        self,
        source: Rows,
        open_stage: Callable[[ExitStack, bool], Stage],
        channels: int,
        limit: int,
        scale: float = 1.0,
        *,
        carries: bool = False,
    ) -> None:
        self._source, self._open = source, open_stage
        self._carries, self.is_fresh = carries, not carries
        self.channels, self.limit = channels, limit
        self.height, self.width = int(source.height * scale), int(source.width * scale)

    def open(self, until: ExitStack, *, drain: bool) -> ReadFn:
        source, stage = self._source.open(until, drain=drain), self._open(until, drain)
        if not self._carries:
            return lambda first, last, keep: [stage.make(source, first, last, keep)]
        return _carrying(lambda first, last: stage.make(source, first, last, last))


def _carrying(make: Callable[[int, int], torch.Tensor]) -> ReadFn:
    """Reads what `make` makes of each row once, and keeps what overlaps with the next run."""
    carried: list[torch.Tensor] = []
    end = 0

    def read(first: int, last: int, keep: int) -> list[torch.Tensor]:
        nonlocal end
        known = end - first
        parts = [rows[:, :, -known:] for rows in carried] if known > 0 else []
        carried.clear()
        if last > end:
            parts.append(make(max(first, end), last))
            end = last
        if keep < end:
            rows = parts[-1] if parts[-1].shape[2] >= end - keep else torch.cat(parts, 2)
            carried.append(rows[:, :, keep - end :].clone())
            del rows
        if last < end:
            parts[-1] = parts[-1][:, :, : last - end]
        return parts

    return read


class Part:
    """The map `remade`, whose first rows are stored; the others are recomputed.

    Memory: the stored rows, and what recomputing the others holds.
    """

    is_fresh = False

    def __init__(self, stored: Stored, remade: Piped) -> None:
        self._stored, self._remade, self.limit = stored, remade, remade.limit
        self.height, self.width, self.channels = remade.height, remade.width, remade.channels

    def open(self, until: ExitStack, *, drain: bool) -> ReadFn:
        stored = self._stored.open(until, drain=drain)
        remade, top = self._remade.open(until, drain=False), self._stored.height

        def read(first: int, last: int, keep: int) -> list[torch.Tensor]:
            found = stored(first, min(last, top), keep) if first < top else []
            return found + (remade(max(first, top), last, keep) if last > top else [])

        return read


class Joined:
    """The sum of two maps of one size; it can be read once.

    Args:
        made: the map whose rows become those of the sum, in place.
        skip: the map to add.
        remade: the same sum, for readers that need it more than once.

    Memory: what reading both maps holds.
    """

    is_fresh = True

    def __init__(self, made: Piped, skip: Rows, remade: Piped | None = None) -> None:
        self._made, self._skip, self.remade = made, skip, remade
        self.channels, self.height, self.width = skip.channels, skip.height, skip.width
        self.limit = made.limit

    def open(self, until: ExitStack, *, drain: bool) -> ReadFn:
        """See `Rows`.

        Raises:
            ValueError: not `drain`.
        """
        if not drain:
            raise ValueError("a joined map can be read once, with drain")
        made, skip = self._made.open(until, drain=True), self._skip.open(until, drain=True)

        def read(first: int, last: int, keep: int) -> list[torch.Tensor]:
            [rows] = made(first, last, keep)
            add_rows_(rows, skip(first, last, keep))
            return [rows]

        return read
