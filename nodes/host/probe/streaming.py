"""The weights that a sampling copies to the device in each step, and those evicted from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...probe.record import Figure
from ...words import Words

FIRST = Words("streamedFirst", "weights streamed in the first step, at least")
LATER = Words("streamedLater", "weights streamed in each later step, at least")


class Streaming:
    """Follows how much of a model is on its device.

    The host counts no transfers. But a step needs every weight, so the weights that are not on the
    device when a step begins are copied there during the step. What comes and goes within a step is
    not seen.
    """

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher
        self._resident = patcher.loaded_size()
        self._missing = 0  # when the open step began
        self._steps: list[int] = []
        self._evicted = 0

    def begin_step(self) -> None:
        self.read()
        self._missing = max(0, self._patcher.model_size() - self._resident)

    def end_step(self) -> None:
        self._steps.append(self._missing)

    def read(self) -> None:
        """Counts what was evicted since the last reading."""
        resident = self._patcher.loaded_size()
        self._evicted += max(0, self._resident - resident)
        self._resident = resident

    def figures(self) -> Iterator[Figure]:
        first, later = self._steps[:1], self._steps[1:]
        no_step = Words("noStep", "no step has ended")
        yield Figure(FIRST, first[0]) if first else Figure(FIRST, None, no_step)
        mean = round(sum(later) / len(later)) if later else None
        yield Figure(LATER, mean, None if later else Words("noLater", "there was none"))
        name = type(self._patcher.model).__name__
        evicted = Words("evicted", "$1: weights evicted while it was sampled, at least", name)
        yield Figure(evicted, self._evicted)
