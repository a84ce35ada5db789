"""What the pack and the host log while a row is measured. Standard library only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Says what our nodes did in a call; what a node says when it is made, its file's own logger says.
OURS = "pack.nodes.host"


class _Ear(logging.Handler):
    def __init__(self, notes: list[str], shorten: Callable[[str], str]) -> None:
        super().__init__(logging.INFO)
        self._notes, self._shorten = notes, shorten

    def emit(self, record: logging.LogRecord) -> None:
        is_ours = record.name.startswith(OURS)
        text = self._shorten(record.getMessage())
        if (is_ours or record.levelno >= logging.WARNING) and text not in self._notes:
            self._notes.append(text)


@contextmanager
def heard(shorten: Callable[[str], str]) -> Iterator[list[str]]:
    """Yields the messages so far, each once: ours from INFO on, all others from WARNING on.

    So a row tells when our nodes left a call to the host, or the host fell back to tiles.
    """
    notes: list[str] = []
    root, ours, ear = logging.getLogger(), logging.getLogger(OURS), _Ear(notes, shorten)
    level = ours.level
    root.addHandler(ear)
    ours.setLevel(logging.INFO)
    try:
        yield notes
    finally:
        ours.setLevel(level)
        root.removeHandler(ear)
