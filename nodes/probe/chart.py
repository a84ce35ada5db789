"""The timeline as a drawing: which shapes, in which colour. Who draws them is not said here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..units import GIB, MIB, size
from .record import Record, Sample
from .report import headline

Point = tuple[float, float]
# Blue, orange and grey hold on light and dark, and for the colour-blind.
COLOURS = {"weights": "#4477aa", "activations": "#ee8833", "other": "#8a8f98"}
BACKGROUND = "#16181c"
TEXT = "#e6e8eb"
FAINT = "#3a3f47"
PEAK = "#ff5c6c"
CEILING = "#c8ccd2"
_TOP, _BOTTOM, _LEFT, _RIGHT = 56, 34, 84, 16


@dataclass(frozen=True, slots=True)
class Area:
    """A filled polygon."""

    points: tuple[Point, ...]
    colour: str


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line."""

    start: Point
    end: Point
    colour: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text whose left (or right) middle stands at a point."""

    at: Point
    text: str
    colour: str
    is_right: bool = False


@dataclass(frozen=True, slots=True)
class Drawing:
    """Shapes in the order in which they are drawn, in pixels from the top left."""

    width: int
    height: int
    background: str
    shapes: tuple[Area | Line | Text, ...]


def drawing(record: Record, *, width: int = 960, height: int = 420) -> Drawing:
    """The stacked timeline of a record, with steps, peak and the card's size as the ceiling."""
    plot_right, plot_bottom = width - _RIGHT, height - _BOTTOM
    shapes: list[Area | Line | Text] = [Text((16, 18), headline(record), TEXT)]
    left = 16.0
    for name, colour in COLOURS.items():
        shapes.append(Area(_box(left, 32, left + 10, 42), colour))
        shapes.append(Text((left + 16, 37), name, TEXT))
        left += 30 + 8 * len(name)
    samples = record.timeline
    if not samples or record.peak_bytes is None:
        return Drawing(width, height, BACKGROUND, tuple(shapes))
    peak = max(record.peak_bytes, 1)
    ceiling = record.device.total_bytes
    # A ceiling far above the peak would press the picture flat; it is then only named.
    shows_ceiling = ceiling is not None and ceiling <= 2 * peak
    top = max(peak, ceiling or 0) * 1.05 if shows_ceiling else peak * 1.12
    end = max(samples[-1].t_s, 1e-6)

    def x(t_s: float) -> float:
        return _LEFT + (plot_right - _LEFT) * t_s / end

    def y(count: float) -> float:
        return plot_bottom - (plot_bottom - _TOP) * count / top

    for count in _marks(top):
        shapes.append(Line((_LEFT, y(count)), (plot_right, y(count)), FAINT))
        shapes.append(Text((_LEFT - 8, y(count)), size(int(count)), TEXT, is_right=True))
    shapes += _areas(samples, x, y)
    for step in record.steps:
        shapes.append(Line((x(step.start_s), _TOP), (x(step.start_s), plot_bottom), FAINT))
    shapes.append(Line((_LEFT, y(peak)), (plot_right, y(peak)), PEAK))
    shapes.append(Text((plot_right, y(peak) - 9), f"peak {size(peak)}", PEAK, is_right=True))
    if ceiling is not None:
        text = f"{record.device.name}: {size(ceiling)}"
        if shows_ceiling:
            shapes.append(Line((_LEFT, y(ceiling)), (plot_right, y(ceiling)), CEILING))
        shapes.append(Text((plot_right, 37), text, CEILING, is_right=True))
    shapes.append(Text((_LEFT, height - 14), "0 s", TEXT))
    shapes.append(Text((plot_right, height - 14), f"{end:.2f} s", TEXT, is_right=True))
    return Drawing(width, height, BACKGROUND, tuple(shapes))


def _marks(top: float) -> list[float]:
    """Round numbers of bytes from 0 to the top, four or a few more steps apart."""
    unit = GIB if top >= GIB else MIB
    rough = top / unit / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (0.5, 1, 2, 5) if 2 * f * power > rough) * unit
    return [step * index for index in range(int(top / step) + 1)]


def _areas(samples: tuple[Sample, ...], x, y) -> list[Area]:
    """The three parts, one on top of the other: weights, other, activations.

    In steps: a sample is the highest since the one before, and what lay between is not known.
    """
    times = [x(s.t_s) for s in samples]
    starts, ends, ended = times[:-1], times[1:], samples[1:]
    if len(samples) == 1:  # a moment is drawn as wide as the plot
        starts, ends, ended = [x(0.0)], [max(times[0], x(0.0) + 1)], samples

    def edge(heights: list[int]) -> list[Point]:
        bars = zip(starts, ends, heights, strict=True)
        return [(side, y(height)) for start, end, height in bars for side in (start, end)]

    low = [0] * len(ended)
    areas = []
    for name in ("weights", "other", "activations"):
        high = [base + getattr(s.parts, name) for base, s in zip(low, ended, strict=True)]
        areas.append(Area((*edge(high), *reversed(edge(low))), COLOURS[name]))
        low = high
    return areas


def _box(left: float, top: float, right: float, bottom: float) -> tuple[Point, ...]:
    return ((left, top), (right, top), (right, bottom), (left, bottom))
