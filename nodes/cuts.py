"""Cuts a length into pieces; the only cutter there is. Integers only."""

from __future__ import annotations


def pieces(length: int, size: int) -> list[tuple[int, int]]:
    """The (start, stop) of consecutive pieces of `size`, the last one shorter.

    Raises:
        ValueError: size < 1.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    return [(start, min(start + size, length)) for start in range(0, length, size)]
