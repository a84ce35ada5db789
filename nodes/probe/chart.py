"""What a record's chart shows: colours, stack, axis and ticks.

The page draws the same chart in js/probe. Colours and the order of the stack come from one file,
js/shared/palette.js. A test compares axis, ticks and areas with those of js/probe/geometry.js.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..units import GIB, MIB
from .record import Record, Sample

_PALETTE_FILE = Path(__file__).resolve().parents[2] / "js" / "shared" / "palette.js"
_, _, _literal = _PALETTE_FILE.read_text(encoding="utf-8").partition("export default ")
PALETTE: dict[str, Any] = json.loads(_literal.strip().rstrip(";"))
# The parts from the bottom up. What changes most is on top, where its shape is the chart's own.
STACK: dict[str, str] = PALETTE["parts"]
UNITS = {"GiB": GIB, "MiB": MIB, "KiB": 2**10, "B": 1}
_MARK_PX = 30


class Axis(NamedTuple):
    """The vertical axis, in bytes.

    A close-up cuts it: what lies below `low` is pressed into the share `below` of the height.
    """

    below: float
    low: float
    high: float
    has_ceiling: bool


def axis_of(record: Record) -> Axis:
    """The axis on which the record's changes are seen; cut where they are small.

    The device's size is drawn to scale where it does not press the measured bytes flat.
    """
    samples = record.timeline
    peak = max(record.peak_bytes or 0, *(sample.parts.total for sample in samples))
    in_steps = [sample for sample in samples if sample.step is not None]
    lowest = min(sample.parts.total for sample in in_steps or samples)
    ceiling = record.device.total_bytes
    if lowest > 0 and peak - lowest < 0.15 * peak:
        room = max((peak - lowest) * 0.12, peak * 0.0005, 1)
        has_ceiling = ceiling is not None and ceiling - peak < 1.5 * (peak - lowest)
        high = max(peak, ceiling or 0) if has_ceiling else peak
        return Axis(0.3, max(0, lowest - room), high + room, has_ceiling)
    has_ceiling = ceiling is not None and ceiling < 1.9 * peak
    high = max(peak, ceiling or 0, 1) if has_ceiling else max(peak, 1)
    return Axis(0, 0, high * 1.06, has_ceiling)


def height_of(count: float, axis: Axis) -> float:
    """How high on the axis that many bytes are, 0 to 1."""
    below, low, high, _ = axis
    if count < low:
        return below * max(0, count) / low
    return below + (1 - below) * (min(count, high) - low) / (high - low)


def unit_of(count: float) -> str:
    """The largest unit of which there is at least one."""
    return next((name for name, size in UNITS.items() if count >= size), "B")


def marks_of(axis: Axis, height_px: float) -> list[tuple[float, str]]:
    """Where the axis has numbers, in bytes, and the numbers in the unit of its end."""
    unit = UNITS[unit_of(axis.high)]
    wanted = max(2, math.floor((1 - axis.below) * height_px / _MARK_PX))
    values = ticks(axis.low / unit, axis.high / unit, wanted)
    digits = tick_digits(values)
    return [(value * unit, f"{value:.{digits}f}") for value in values]


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Values from low to high, at most about as many as wanted: 1, 2 or 5 times a power of 10."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_digits(values: Sequence[float]) -> int:
    """Digits after the point that tell neighbouring ticks apart."""
    if len(values) < 2:
        return 0 if values == [0] else 1
    return max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))


def areas_of(samples: Sequence[Sample]) -> dict[str, list[tuple[float, int]]]:
    """The stack from the bottom up, in steps: a sample is the highest since the one before.

    Returns:
        Each part as a closed line of (seconds, bytes).
    """
    times = [sample.t_s for sample in samples]
    if len(samples) == 1:  # drawn as wide as the chart
        times, samples = [times[0], times[0] + 1e-3], [*samples, *samples]
    sums = [0] * (len(samples) - 1)

    def edge() -> list[tuple[float, int]]:
        spans = zip(times, times[1:], sums, strict=False)
        return [(side, height) for start, end, height in spans for side in (start, end)]

    areas = {}
    for part in STACK:
        bottom = edge()
        sums = [low + getattr(s.parts, part) for low, s in zip(sums, samples[1:], strict=True)]
        areas[part] = [*edge(), *reversed(bottom)]
    return areas
