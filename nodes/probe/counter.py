"""One peak counter that can be reset, shared by readers who must not disturb one another.

An allocator counts its highest value since its last reset, and so does the kernel for a process.
A reset takes the peak away from every other reader. Here each reader has an interval of its own,
and a reset first gives every open interval its share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Count(NamedTuple):
    """Bytes now, and the highest since the counter was reset."""

    current: int
    peak: int


class High(NamedTuple):
    """The highest of an interval.

    is_exact: False where the counter already showed a higher peak and was not reset. Then `bytes`
        is the highest of the readings, and what happened between them is not known.
    """

    bytes: int
    is_exact: bool


class PeakCounter:
    """Shares a counter among intervals.

    Args:
        read: reads the counter.
        reset: sets the peak to the current value; None where that cannot be done.
    """

    def __init__(self, read: Callable[[], Count], reset: Callable[[], None] | None) -> None:
        self._read, self._reset = read, reset
        self._intervals: list[Interval] = []

    def open(self, *, reset: bool) -> Interval:
        """Begins an interval now.

        Args:
            reset: whether the counter may be reset; readers outside of here may notice.
        """
        count = self.settle(reset=reset)
        was_reset = reset and self._reset is not None
        interval = Interval(self, count.current, -1 if was_reset else count.peak)
        self._intervals.append(interval)
        return interval

    def open_since_reset(self) -> Interval:
        """Begins an interval that reaches back to the last reset."""
        interval = self.open(reset=False)
        interval._stale = -1
        interval._note(self._read())
        return interval

    def settle(self, *, reset: bool) -> Count:
        """Reads the counter, gives every open interval its share, and returns what was read."""
        count = self._read()
        for interval in self._intervals:
            interval._note(count)
        if reset and self._reset is not None:
            self._reset()
            for interval in self._intervals:
                interval._stale = -1
        return count


class Interval:
    """What one reader has seen since it began, or since its last `take`."""

    def __init__(self, counter: PeakCounter, current: int, stale: int) -> None:
        self.current = current
        self._counter = counter
        # A peak up to this value is from before the interval.
        self._stale = stale
        self._high = current
        # Up to here it may have risen without being seen.
        self._unseen = -1

    def take(self, *, reset: bool) -> High:
        """Returns the highest since the last call, and begins again."""
        self._counter.settle(reset=reset)
        high = High(self._high, self._high >= self._unseen)
        self._high, self._unseen = self.current, -1
        return high

    def close(self) -> None:
        """Ends the interval; closing twice is harmless."""
        if self in self._counter._intervals:
            self._counter._intervals.remove(self)

    def _note(self, count: Count) -> None:
        self.current = count.current
        if count.peak > self._stale:
            self._high = max(self._high, count.peak)
        else:
            self._high = max(self._high, count.current)
            self._unseen = max(self._unseen, self._stale)
        # The same peak is not a second interval's.
        self._stale = max(self._stale, count.peak)
