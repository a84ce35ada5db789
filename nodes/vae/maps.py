"""Maps as strips of rows: stored on the device, stored in RAM, or recomputed at each reading.

The last reader passes `drain=True`. Each strip is then freed once it is read, while the strips of
the next map are written. So generators keep no name for a strip that they yield.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Protocol

import torch

from .cuts import even_runs
from .ram import Ram, RamStrip
from .strips import RowQueue, Stage


class Rows(Protocol):
    """A map [1, C, height, width] that can be read in strips, top to bottom."""

    height: int
    width: int
    channels: int

    def read(self, limit: int, *, drain: bool) -> Iterator[torch.Tensor]:
        """Yields the strips, of about `limit` rows; with `drain`, frees them as they are read."""
        ...


class Whole:
    """A map that is a tensor [1, C, H, W], read as views; the caller keeps it."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        _, self.channels, self.height, self.width = rows.shape

    def read(self, limit: int, *, drain: bool) -> Iterator[torch.Tensor]:
        return self.read_from(0, limit)

    def read_from(self, start: int, limit: int) -> Iterator[torch.Tensor]:
        for first, last in even_runs(self.height - start, limit):
            yield self._rows[:, :, start + first : start + last]


class Stored:
    """A list of strips, of which `missing` rows are still to be appended.

    Args:
        height: rows of the map that will be appended.
        limit: rows of a strip; shorter strips are joined.
        ram: where the strips wait; None keeps them on the device.

    Memory: the map, less what was drained. In RAM: nothing on the device.
    """

    def __init__(self, height: int, limit: int, *, ram: Ram | None = None) -> None:
        self.height, self.width, self.channels = height, 0, 0
        self._limit, self._ram = limit, ram
        self._strips: deque[torch.Tensor | RamStrip] = deque()
        self._short: list[torch.Tensor] = []
        self.missing, self._is_drained = height, False

    def append(self, rows: torch.Tensor) -> None:
        """Stores the next strip, [1, C, n, W]; the caller must not write into it any more.

        Raises:
            ValueError: more rows than the map has.
        """
        _, self.channels, count, self.width = rows.shape
        self.missing -= count
        if self.missing < 0:
            raise ValueError(f"the map has {-self.missing} rows less than were appended")
        self._short.append(rows)
        del rows
        waiting = sum(part.shape[2] for part in self._short)
        if 2 * waiting > self._limit or not self.missing:
            parts, self._short = self._short, []
            joined = parts.pop() if len(parts) == 1 else torch.cat(parts, 2)
            del parts
            self._strips.append(joined if self._ram is None else self._ram.keep(joined))

    def read(self, limit: int, *, drain: bool) -> Iterator[torch.Tensor]:
        """See `Rows`.

        Raises:
            ValueError: the map is not complete, or was drained.
        """
        if self.missing or self._is_drained:
            raise ValueError(f"a map of {self.height} rows is not complete or was drained")
        self._is_drained = drain
        strips, self._strips = self._strips, deque() if drain else self._strips.copy()
        while strips:
            strip = strips.popleft()
            if isinstance(strip, RamStrip):
                yield from strip.read(even_runs(strip.height, limit), drain=drain)
                continue
            rows, runs = [strip], even_runs(strip.shape[2], limit)
            del strip
            for start, stop in runs[:-1]:
                yield rows[0][:, :, start:stop]
            yield rows.pop()[:, :, runs[-1][0] :]


class Piped:
    """A map that is recomputed at each reading: another map's strips through a stage.

    Args:
        source: the map to read.
        open_stage: makes the stage for one reading. It gets a stack, until whose end it may borrow
            weights; whether this is the last reading; and the number of rows.
        channels: of the result.
        scale: rows of the result per row of the source: 1, 2, or 0.5.
        most: rows of the source to read at a time, at most.
        reach: how many rows above it a row of the result depends on; for `read_from`.

    Memory: what reading the source holds, and the stage.
    """

    def __init__(
        self,
        source: Rows,
        open_stage: Callable[[ExitStack, bool, int], Stage],
        channels: int,
        scale: float = 1.0,
        most: int | None = None,
        reach: int = 0,
    ) -> None:
        self._source, self._open, self._scale, self._most = source, open_stage, scale, most
        self.channels, self._reach = channels, reach
        self.height, self.width = int(source.height * scale), int(source.width * scale)

    def read(self, limit: int, *, drain: bool) -> Iterator[torch.Tensor]:
        of_source = max(1, int(limit / self._scale))
        of_source = of_source if self._most is None else min(of_source, self._most)
        with ExitStack() as until:
            stage = self._open(until, drain, self._source.height)
            yield from _pushed(self._source.read(of_source, drain=drain), stage)

    def read_from(self, start: int, limit: int) -> Iterator[torch.Tensor]:
        """Yields the strips from row `start` to the last row; the source is not drained.

        Raises:
            ValueError: the map has another size than its source, or the source cannot do this.
        """
        if self._scale != 1 or not isinstance(self._source, Whole | Piped):
            raise ValueError("only a map of its source's size, made of one such, can be begun late")
        # The rows above are at the edge of what is read, so they come out wrong and are dropped.
        above = min(start, self._reach)
        first = start - above
        with ExitStack() as until:
            stage = self._open(until, False, self.height - first)
            for rows in _pushed(self._source.read_from(first, limit), stage):
                dropped = min(above, rows.shape[2])
                above -= dropped
                given = [rows[:, :, dropped:]]
                del rows
                if given[0].shape[2]:
                    yield given.pop()


class Part:
    """The map `remade`, whose first rows are stored; the others are recomputed.

    Memory: the stored rows, and what recomputing the others holds.
    """

    def __init__(self, stored: Stored, remade: Piped) -> None:
        self._stored, self._remade = stored, remade
        self.height, self.width, self.channels = remade.height, remade.width, remade.channels

    def read(self, limit: int, *, drain: bool) -> Iterator[torch.Tensor]:
        yield from self._stored.read(limit, drain=drain)
        yield from self._remade.read_from(self._stored.height, limit)


class Joined:
    """The sum of two maps of one size; it can be read once.

    Args:
        made: the map whose strips become those of the sum, in place.
        skip: the map to add.
        remade: the same sum, for readers that need it more than once.

    Memory: what reading both maps holds.
    """

    def __init__(self, made: Piped, skip: Rows, remade: Piped | None = None) -> None:
        self._made, self._skip, self.remade = made, skip, remade
        self.channels, self.height, self.width = skip.channels, skip.height, skip.width

    def read(self, limit: int, *, drain: bool) -> Iterator[torch.Tensor]:
        """See `Rows`.

        Raises:
            ValueError: not `drain`.
        """
        if not drain:
            raise ValueError("a joined map can be read once, with drain")
        waiting = RowQueue()
        skips = self._skip.read(limit, drain=True)
        for made in self._made.read(limit, drain=True):
            while waiting.rows < made.shape[2]:
                waiting.put(next(skips))
            waiting.add_to_(made)
            given = [made]
            del made
            yield given.pop()


def _pushed(strips: Iterator[torch.Tensor], stage: Stage) -> Iterator[torch.Tensor]:
    for rows in strips:
        given = [rows]
        del rows
        made = stage.push(given.pop())
        if made is not None:
            given.append(made)
            del made
            yield given.pop()
