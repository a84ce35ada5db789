"""Bars of memory, made of their parts, with the budget as a line. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..nodes.units import GIB, MIB
from .svg import Drawing, Theme

# The parts of a bar from the left; their classes in the drawing.
PARTS = {"weights": "weights", "activations": "activations", "workspace": "other", "other": "other"}
WIDTH, LEFT, RIGHT, WORDS = 800, 150, 550, 562  # px; bars, and their words to the right
BAR_PX, GAP_PX, HEAD_PX, GROUP_GAP_PX = 18, 6, 28, 14
LINE_CHARACTERS = 124  # of a note, at 11 px


@dataclass(frozen=True)
class Bar:
    """name: to its left. parts: bytes by their name, see `PARTS`. words: to its right.

    is_over: it does not fit, which its words say in the colour of an alarm.
    """

    name: str
    parts: Mapping[str, int]
    words: str
    is_over: bool = False

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Group:
    """Bars to compare with each other, under a name and a line of words."""

    name: str
    words: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Bars:
    """A chart: one group below the other.

    budget_bytes: drawn as a line through all groups; None: there is none.
    """

    title: str
    subtitle: str
    groups: tuple[Group, ...]
    notes: tuple[str, ...]
    budget_bytes: int | None = None
    budget_words: str = ""

    def svg(self, theme: Theme | None = None) -> str:
        """The chart as SVG; without a theme the reader's own decides."""
        top = 98
        heights = [HEAD_PX + (BAR_PX + GAP_PX) * len(group.bars) for group in self.groups]
        bottom = top + sum(heights) + GROUP_GAP_PX * (len(heights) - 1)
        notes = [line for note in self.notes for line in wrapped(note)]
        told = "; ".join(
            f"{group.name}, {bar.name}: {bar.words}" for group in self.groups for bar in group.bars
        )
        drawing = Drawing(
            WIDTH, bottom + 48 + 16 * len(notes), title=self.title, description=told, theme=theme
        )
        drawing.text(20, 34, self.title, size=17, is_bold=True)
        drawing.text(20, 57, self.subtitle, size=12, name="fill-soft")
        self._legend(drawing)
        ticks = self._ticks()
        for group, height in zip(self.groups, heights, strict=True):
            self._group(drawing, group, top, [x for x, _ in ticks])
            top += height + GROUP_GAP_PX
        for x, words in ticks:
            drawing.text(x, bottom + 16, words, size=11, name="fill-soft", anchor="middle")
        for number, line in enumerate(notes):
            drawing.text(20, bottom + 46 + 16 * number, line, size=11, name="fill-soft")
        return drawing.render()

    @property
    def _most_bytes(self) -> int:
        """At the right end."""
        most = max(bar.total_bytes for group in self.groups for bar in group.bars)
        return max(most, self.budget_bytes or 0, 1)

    def _x(self, count: float) -> float:
        return LEFT + (RIGHT - LEFT) * count / self._most_bytes

    def _legend(self, drawing: Drawing) -> None:
        drawn = {part for group in self.groups for bar in group.bars for part in bar.parts}
        x = LEFT
        for part, colour in PARTS.items():
            if part in drawn:
                drawing.box(x, 74, 12, 12, f"fill-{colour}", rx=2)
                drawing.text(x + 18, 85, part, size=12)
                x += 115
        if self.budget_bytes is not None:
            drawing.line(x + 6, 72, x + 6, 88, "line-ink", stroke_width=2)
            drawing.text(x + 16, 85, self.budget_words, size=12, is_bold=True)

    def _ticks(self) -> list[tuple[float, str]]:
        return [(self._x(value), words) for value, words in marks(self._most_bytes)]

    def _group(self, drawing: Drawing, group: Group, top: float, ticks: Sequence[float]) -> None:
        drawing.text(20, top + 18, group.name, size=13, is_bold=True)
        drawing.text(LEFT, top + 18, group.words, size=11, name="fill-soft")
        top += HEAD_PX
        bottom = top + (BAR_PX + GAP_PX) * len(group.bars) - GAP_PX
        for x in ticks:
            drawing.line(x, top - 3, x, bottom + 3, "line-grid")
        for number, bar in enumerate(group.bars):
            y, x = top + (BAR_PX + GAP_PX) * number, float(LEFT)
            drawing.text(20, y + 13, bar.name, size=12)
            for part, colour in PARTS.items():
                width = self._x(bar.parts.get(part, 0)) - LEFT
                if width > 0:
                    drawing.box(x, y, width, BAR_PX, f"fill-{colour}")
                x += width
            name = "fill-alarm" if bar.is_over else "fill-ink"
            drawing.text(WORDS, y + 13, bar.words, size=12, name=name, is_bold=bar.is_over)
        if self.budget_bytes is not None:
            x = self._x(self.budget_bytes)
            drawing.line(x, top - 5, x, bottom + 5, "line-ink", stroke_width=2)


def marks(most_bytes: float) -> list[tuple[float, str]]:
    """About five round values up to the most, and their words."""
    unit, name = (GIB, "GiB") if most_bytes >= GIB else (MIB, "MiB")
    rough = most_bytes / unit / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    count = int(most_bytes / unit / step + 1e-9)
    return [
        (n * step * unit, f"{n * step:g}" + (f" {name}" if n else "")) for n in range(count + 1)
    ]


def wrapped(note: str) -> list[str]:
    """The lines of a note."""
    lines = [""]
    for word in note.split():
        if len(lines[-1]) + len(word) >= LINE_CHARACTERS:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines
