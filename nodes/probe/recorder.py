"""Collects what a probe measures, and gives it as a record at any moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from .record import LiveTensor, Moment, Parts, Record, Sample, State, Step
from .timeline import Timeline

Clock = Callable[[], float]


class Recorder:
    """The timeline, the steps and the peak of what one probe measures.

    Args:
        blank: the record without measurements: label, settings, device.
        clock: seconds, from any origin.

    is_at_least: whether a higher peak may have passed between two readings.
    step: the step that is open; the first is 1.
    files: names of the files that were written.
    """

    def __init__(self, blank: Record, clock: Clock = time.perf_counter) -> None:
        self.blank = blank
        self.largest: tuple[LiveTensor, ...] = ()
        self.samplings = 0
        self.is_at_least = False
        self.step: int | None = None
        self.files: list[str] = []
        self._clock = clock
        self._start = clock()
        self._timeline = Timeline()
        self._steps: list[Step] = []
        self._peak: Sample | None = None
        self._operation: str | None = None
        self._notes: dict[str, None] = {}  # in order, each once
        self._step_start = 0.0
        self._step_peak = 0

    @property
    def peak_bytes(self) -> int:
        return self._peak.parts.total if self._peak is not None else 0

    def note(self, text: str) -> None:
        """Adds a remark for the reader, unless it was made before."""
        self._notes[text] = None

    def point(
        self, parts: Parts, *, block: str | None = None, operation: str | None = None
    ) -> bool:
        """Adds the highest moment since the last point; True if it is a new peak."""
        sample = Sample(self._clock() - self._start, parts, self.step, block)
        self._timeline.add(sample)
        self._step_peak = max(self._step_peak, parts.total)
        if self._peak is not None and parts.total <= self._peak.parts.total:
            return False
        self._peak, self._operation = sample, operation
        return True

    def begin_step(self) -> None:
        """Opens the next step."""
        self.step = len(self._steps) + 1
        self._step_start = self._clock() - self._start
        self._step_peak = 0

    def end_step(self) -> None:
        """Closes the open step; without one nothing happens."""
        if self.step is not None:
            seconds = self._clock() - self._start - self._step_start
            self._steps.append(Step(self.step, self._step_start, seconds, self._step_peak))
            self.step = None

    def drop_step(self) -> None:
        """Forgets the open step: what follows the last step is not a step."""
        self.step = None

    def record(self, state: State) -> Record:
        """Returns what was seen so far."""
        seen = replace(
            self.blank,
            state=state,
            is_at_least=self.is_at_least,
            timeline=self._timeline.samples(),
            steps=tuple(self._steps),
            largest=self.largest,
            notes=(*self.blank.notes, *self._notes),
            files=tuple(self.files),
        )
        if self._peak is None:
            return seen
        at = Moment(self._peak.t_s, self._peak.step, self._peak.block, self._operation)
        parts = self._peak.parts
        return replace(seen, peak_bytes=parts.total, peak_at=at, parts_at_peak=parts)


def parts_of(total: int, weights: int, before: int) -> Parts:
    """Splits a total: weights first, then what was there before, and the rest is activations.

    Args:
        total: bytes in use.
        weights: bytes of weights among them; a mapped file may count for more than is resident.
        before: bytes other than weights when the measuring began.

    Returns:
        Parts whose sum is `total`.
    """
    weights = max(0, min(weights, total))
    other = max(0, min(before, total - weights))
    return Parts(weights, total - weights - other, other)


class Pace:
    """Lets through at most `per_second` events."""

    def __init__(self, per_second: float, clock: Clock = time.perf_counter) -> None:
        self._gap = 1 / per_second
        self._clock = clock
        self._last = float("-inf")

    def is_due(self) -> bool:
        """True if an event may go out now; it then counts as sent."""
        now = self._clock()
        if now - self._last < self._gap:
            return False
        self._last = now
        return True

    def wait_s(self) -> float:
        """Seconds until the next event may go out."""
        return max(0.0, self._last + self._gap - self._clock())
