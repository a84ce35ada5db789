"""What a watched sampling brings to the device again and again, and what is evicted from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FIRST = "weights streamed in the first step, at least"
LATER = "weights streamed in each later step, at least"


class Streaming:
    """Follows how much of a model is on its device.

    The host counts no transfers. But a step needs every weight, so what is not on the device when
    the step begins is brought there in it; what comes and goes within a step is not seen.

    Args:
        patcher: of the model that is sampled.
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
        """Notes what has gone since it was read last."""
        resident = self._patcher.loaded_size()
        self._evicted += max(0, self._resident - resident)
        self._resident = resident

    def figures(self) -> Iterator[tuple[str, int | None, str | None]]:
        """Name, bytes, and the reason where there are no bytes."""
        first, later = self._steps[:1], self._steps[1:]
        yield FIRST, *((first[0], None) if first else (None, "no step has ended"))
        mean = (round(sum(later) / len(later)), None) if later else (None, "there was none")
        yield LATER, *mean
        name = type(self._patcher.model).__name__
        yield f"{name}: weights evicted while it was sampled, at least", self._evicted, None
