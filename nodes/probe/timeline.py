"""A timeline of bounded length that never loses its highest point."""

from __future__ import annotations

from .record import Sample

LIMIT = 400


class Timeline:
    """Keeps the highest of every `stride` samples; the stride doubles when the list is full.

    Memory: at most LIMIT samples, whatever the number that is added.
    """

    def __init__(self) -> None:
        self._stride = 1
        self._kept: list[Sample] = []
        self._open: Sample | None = None  # highest of the samples that are not a point yet
        self._waiting = 0
        self._last: Sample | None = None

    def add(self, sample: Sample) -> None:
        """Adds a sample; its time must not lie before the last one's."""
        self._last = sample
        if not self._kept:  # the first stays, so that the line begins where the measuring began
            self._kept.append(sample)
            return
        if self._open is None or sample.parts.total > self._open.parts.total:
            self._open = sample
        self._waiting += 1
        if self._waiting == self._stride:
            self._kept.append(self._open)
            self._open, self._waiting = None, 0
            if len(self._kept) > LIMIT - 2:
                self._halve()

    def samples(self) -> tuple[Sample, ...]:
        """Returns the points in order of time, the newest sample among them."""
        points = list(self._kept)
        if self._open is not None:
            points.append(self._open)
        if self._last is not None and points[-1] is not self._last:
            points.append(self._last)
        return tuple(points)

    def _halve(self) -> None:
        first, *rest = self._kept
        pairs = [rest[i : i + 2] for i in range(0, len(rest), 2)]
        # Of two equal ones the earlier: a peak is where it was reached first.
        self._kept = [first, *(max(pair, key=lambda s: s.parts.total) for pair in pairs)]
        self._stride *= 2
