"""The plan of a decode or encode: what it stores, and what it recomputes.

What is stored follows from the preference. The strips are then the largest ones with which the
peak stays within `ROOM` of what the stored maps and the weights take alone. So the launches grow
with the picture's side at most, not with its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ..prefer import PREFERENCES, Prefer, check_prefer
from .cuts import strip_rows as even_rows
from .peak import end_elements, level_elements, middle_elements
from .sizes import LEAST_ROWS, MOST_ELEMENTS, LevelPlan, VaeCall, VaePlan, VaeSizes

# What strips may add to the peak with the smallest ones, at 1024x1024 and below, where strips have
# `LEAST_STRIP_ELEMENTS` even so. To that of a larger picture they add a smaller share, so that
# their number grows as its side does.
ROOM = {"speed": 0.19, "balance": 0.21, "smallest": 0.1}
ROOM_SIDE_PX = 1024
# Elements of a strip at least: with fewer, a large card is idle in part.
LEAST_STRIP_ELEMENTS = 2**21
# Share of the rows of an encoder's largest map that is stored.
SHARES = {"speed": 1.0, "balance": 0.75, "smallest": 0.45}
# How many sizes of strips are tried when memory runs out, and the factor between them.
RETRIES, SHRINK = 3, 4


def tried_again(prefer: Prefer, strip_rows: int, attempt: int) -> tuple[Prefer, int] | None:
    """The preference after so many attempts, and how often its strips are made smaller.

    Returns:
        None if there is nothing smaller to try.

    Raises:
        ValueError: prefer is not one of `PREFERENCES`, or strip_rows < 0.
    """
    check_prefer(prefer)
    if strip_rows < 0:
        raise ValueError(f"strip_rows must be >= 0, got {strip_rows}")
    # First with smaller strips, then with the preferences that store less.
    shrinks = min(attempt, RETRIES - 1)
    place = PREFERENCES.index(prefer) + attempt - shrinks
    return None if place >= len(PREFERENCES) else (PREFERENCES[place], shrinks)


def vae_plan(
    call: VaeCall, *, prefer: Prefer, strip_rows: int = 0, attempt: int = 0
) -> VaePlan | None:
    """The plan for one sample.

    Args:
        prefer: time (speed), memory (smallest), or balance.
        strip_rows: rows of a strip at the picture's size; 0 chooses.
        attempt: how many larger plans ran out of memory before.

    Returns:
        None if there is nothing smaller to try.

    Raises:
        ValueError: prefer is not one of `PREFERENCES`, or strip_rows < 0.
    """
    tried = tried_again(prefer, strip_rows, attempt)
    if tried is None:
        return None
    prefer, shrinks = tried
    rows = strip_rows
    levels = _with_rows(call, prefer, rows) if rows else _with_room(call, prefer)
    shrink = SHRINK**shrinks
    levels = [
        replace(how, limit=_least(how.limit // shrink), later=_least(how.later // shrink))
        for how in levels
    ]
    # In half types the rounded sums of taps would add to the error.
    return VaePlan(tuple(levels), call.dtype_bytes == 4, prefer)


def _least(rows: int) -> int:
    return max(LEAST_ROWS, rows)


def _smallest(call: VaeCall, prefer: Prefer) -> list[LevelPlan]:
    return [_level_plan(call, level, prefer) for level in range(len(call.sizes.widths))]


def _with_rows(call: VaeCall, prefer: Prefer, strip_rows: int) -> list[LevelPlan]:
    """Strips of so many rows at the picture's size, and of as many elements elsewhere."""
    sizes, levels = call.sizes, _smallest(call, prefer)
    elements = strip_rows * (max(sizes.widths[-2:]) if sizes.is_decoder else sizes.widths[0])
    made = []
    for level, how in enumerate(levels):
        widest = max(sizes.widths[level], sizes.inputs(level))
        rows = _least(elements * sizes.scale(level) // widest)
        made.append(replace(how, limit=rows, later=rows))
    return made


@lru_cache(256)
def _with_room(call: VaeCall, prefer: Prefer) -> tuple[LevelPlan, ...]:
    """The largest strips within the room; the first block's, then the others'."""
    levels = _smallest(call, prefer)
    everywhere = range(len(levels))
    floor = max(middle_elements(call), *(level_elements(call, levels, n) for n in everywhere))
    ends = end_elements(call)
    room = ROOM[prefer] * min(1.0, ROOM_SIDE_PX / math.sqrt(call.height * call.width))
    budget = (1 + room) * (floor + ends) - ends
    chosen = []
    for level, how in enumerate(levels):
        tried = list(levels)
        for name in ("limit", "later"):
            for rows in _choices(call, level):
                tried[level] = replace(how, **{name: rows})
                if level_elements(call, tried, level) <= budget:
                    break
            how = tried[level]
        chosen.append(how)
    return tuple(chosen)


def _choices(call: VaeCall, level: int) -> Iterator[int]:
    """Rows of strips, from the whole map down to the least that keeps a card busy."""
    height, columns = call.sides(level)
    channels = call.sizes.widths[level]
    most = MOST_ELEMENTS // (columns * max(channels, call.sizes.inputs(level)))
    least = min(height, -(-LEAST_STRIP_ELEMENTS // (columns * channels)))
    rows, parts = height, 1
    while rows > least:
        if rows <= most:
            yield rows
        parts += 1
        rows = even_rows(height, -(-height // parts))
    yield _least(min(least, most))


def _level_plan(call: VaeCall, level: int, prefer: Prefer) -> LevelPlan:
    """What a level stores, with the smallest strips."""
    sizes, has_ram = call.sizes, call.has_ram
    if not sizes.is_decoder:
        return _encoder_plan(sizes, level, prefer)
    # 0 is the picture's own size; each level further has a fourth of the pixels.
    from_picture = len(sizes.widths) - 1 - level
    waits = prefer == "smallest" and has_ram
    recomputed = {"speed": 0, "balance": 1, "smallest": 3 if has_ram else 2}[prefer]
    if from_picture >= recomputed:
        return LevelPlan(True, True, True)
    keeps_output = prefer == "balance" or has_ram or from_picture == 1
    return LevelPlan(False, False, keeps_output, in_ram=waits and from_picture < 2)


def _encoder_plan(sizes: VaeSizes, level: int, prefer: Prefer) -> LevelPlan:
    if level == 0:
        # Rows are recomputed from the picture through one block: with more blocks, store all.
        share = SHARES[prefer] if sizes.blocks == 2 else 1.0
        is_speed = prefer == "speed"
        return LevelPlan(False, is_speed, True, share=share, adds_after=is_speed)
    if level == 1 and prefer != "speed":
        return LevelPlan(True, prefer == "balance", True, adds_after=prefer == "balance")
    return LevelPlan(True, True, True)
