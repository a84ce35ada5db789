"""One peak counter that can be reset, shared by readers who must not disturb one another.

An allocator counts its highest value since its last reset, and so does the kernel for a process.
A reset takes the peak away from every other reader. Here each reader has an interval of its own,
and a reset first gives every open interval its share.

Memory beside the allocator, such as pages of dynamic VRAM, has no peak of its own. It is read at
the same moments. What it was between two readings follows only where it can have grown and nothing
else; otherwise the highest sum is a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Region(NamedTuple):
    """Memory that the counter does not count.

    key: tells one region from another.
    bytes: now.
    evictions: how often a reading found that part of the region was evicted since the one before.
        While it is the same, the region only grew. An eviction that a load between the same two
        readings has undone may not be seen.
    """

    key: int
    bytes: int
    evictions: int = 0


class Count(NamedTuple):
    """Bytes now, the highest since the counter was reset, and what it does not count."""

    current: int
    peak: int
    beside: tuple[Region, ...] = ()

    @property
    def beside_bytes(self) -> int:
        return sum(region.bytes for region in self.beside)

    @property
    def total(self) -> int:
        """All bytes now."""
        return self.current + self.beside_bytes


class High(NamedTuple):
    """The highest sum of an interval.

    is_exact: False where a higher one may have passed between two readings: the counter already
        showed a higher peak and was not reset, or a region was evicted or loaded again. Then
        `bytes` is a lower bound.
    beside_bytes: of the regions, in `bytes`.
    """

    bytes: int
    is_exact: bool
    beside_bytes: int = 0


class PeakCounter:
    """Shares a counter among intervals.

    Args:
        read: reads the counter.
        reset: sets the peak to the current value; None where that cannot be done.
    """

    def __init__(self, read: Callable[[], Count], reset: Callable[[], None] | None) -> None:
        self._read, self._reset = read, reset
        self._intervals: list[Interval] = []
        self._last: Count | None = None  # the reading before

    def open(self, *, reset: bool) -> Interval:
        """Begins an interval now.

        Args:
            reset: whether the counter may be reset; readers outside of here may notice.
        """
        count = self.settle(reset=reset)
        was_reset = reset and self._reset is not None
        interval = Interval(self, count, -1 if was_reset else count.peak)
        self._intervals.append(interval)
        return interval

    def open_since_reset(self) -> Interval:
        """Begins an interval that reaches back to the last reset."""
        interval = self.open(reset=False)
        interval._stale = -1
        count = self._read()
        # What the regions were until now is not known.
        interval._note(count, Bounds(0, math.inf if count.beside else 0))
        return interval

    def settle(self, *, reset: bool, is_blind: bool = False) -> Count:
        """Reads the counter, gives every open interval its share, and returns what was read.

        Args:
            is_blind: regions may have come and gone since the reading before.
        """
        count = self._read()
        bounds = bounds_between(self._last.beside if self._last else (), count.beside)
        if is_blind:
            bounds = Bounds(bounds.least, math.inf)
        self._last = count
        for interval in self._intervals:
            interval._note(count, bounds)
        if reset and self._reset is not None:
            self._reset()
            for interval in self._intervals:
                interval._stale = -1
        return count


class Bounds(NamedTuple):
    """The least and most bytes of all regions between two readings."""

    least: int
    most: float


def bounds_between(before: Sequence[Region], now: Sequence[Region]) -> Bounds:
    """What the regions can have been between two readings."""
    gone = {region.key: region for region in before}
    least = most = 0
    for region in now:
        old = gone.pop(region.key, Region(region.key, 0))
        if old.evictions != region.evictions or old.bytes > region.bytes:
            return Bounds(0, math.inf)
        least, most = least + old.bytes, most + region.bytes
    return Bounds(least, math.inf if gone else most)


class Interval:
    """What one reader has seen since it began, or since its last `take`.

    now: the last reading.
    """

    def __init__(self, counter: PeakCounter, count: Count, stale: int) -> None:
        self.now = count
        self._counter = counter
        # A peak up to this value is from before the interval.
        self._stale = stale
        self._restart()

    def take(self, *, reset: bool, is_blind: bool = False) -> High:
        """Returns the highest since the last call, and begins again. Arguments as `settle`."""
        self._counter.settle(reset=reset, is_blind=is_blind)
        high = High(self._high, self._high >= self._unseen, self._beside)
        self._restart()
        return high

    def close(self) -> None:
        """Ends the interval; closing twice is harmless."""
        if self in self._counter._intervals:
            self._counter._intervals.remove(self)

    def _restart(self) -> None:
        self._high, self._beside = self.now.total, self.now.beside_bytes
        # Up to here it may have risen without being seen.
        self._unseen: float = -1

    def _note(self, count: Count, bounds: Bounds) -> None:
        """Adds the time since the reading before; the regions were within `bounds`."""
        self.now = count
        high = (count.total, count.beside_bytes)
        peak = self._stale
        if count.peak > self._stale:  # it rose since then
            peak = count.peak
            high = max(high, (peak + bounds.least, bounds.least))
        if high[0] > self._high:
            self._high, self._beside = high
        self._unseen = max(self._unseen, peak + bounds.most)
        # The same peak is not a second interval's.
        self._stale = peak
