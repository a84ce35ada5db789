"""The one word for the trade between time and memory, on every node that has it."""

from __future__ import annotations

from typing import Literal

from .words import Words

Prefer = Literal["speed", "balance", "smallest"]
PREFERENCES: tuple[Prefer, ...] = ("speed", "balance", "smallest")


def check_prefer(prefer: str) -> None:
    """Raises:
    ValueError: prefer is not one of `PREFERENCES`.
    """
    if prefer not in PREFERENCES:
        raise ValueError(
            Words("unknown", "prefer must be one of $1, got $2", PREFERENCES, repr(prefer))
        )
