"""Numbers on a command line, with one sentence where they are wrong. Standard library only."""

from __future__ import annotations

import argparse
import re

# Beyond every card and rate, so that what is worked out from them is a finite number.
LEAST, MOST = 1e-9, 1e9


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return int(text)


def above_zero(text: str) -> float:
    """A number above 0, from `LEAST` to `MOST`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    if not LEAST <= value <= MOST:
        raise argparse.ArgumentTypeError(f"must be from {LEAST:g} to {MOST:g}, got {text}")
    return value


def size(text: str) -> tuple[int, int]:
    """ "512" or "512x768" as width and height in pixels."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = [int(side) for side in (match[1], match[2] or match[1])] if match else []
    if not sides or any(side % 16 or not 64 <= side <= 8192 for side in sides):
        raise argparse.ArgumentTypeError(
            f"must be like 512 or 512x768, in multiples of 16 from 64 to 8192, got {text}"
        )
    return sides[0], sides[1]
