"""The README's chart of memory by picture size as SVG, and its tables, from its rows alone."""
# ruff: noqa: RUF001 (the sign between the sides of a picture)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from pack.nodes.units import GIB
from pack.runner.svg import Drawing, Theme

from ..card.tables import gib, grid
from ..rows import Row
from .vram_words import CHINESE, ENGLISH, Words

NAMED_GIB = 8  # the card that the title names
TOLD_PX = 4096  # the picture that the description names
WAYS = {"alone": "ComfyUI alone", "balance": "`prefer` balance", "smallest": "smallest"}
BOTH = {"alone": "alone", "balance": "ours"}  # the colours of what is compared
LANGUAGES = {"": ENGLISH, "_zh": CHINESE}
THEMES: tuple[Theme, ...] = ("light", "dark")


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """The largest square picture of each card; the smallest card for some pictures."""
    squares = [
        [f"{row['card_gib']} GiB", *(f"{row[f'{way}_largest_px']} px" for way in WAYS)]
        for row in rows
        if "card_gib" in row
    ]
    least = [
        [f"{row['side_px']}x{row['side_px']}", *(gib(row[f"{way}_least_bytes"]) for way in WAYS)]
        for row in rows
        if row.get("side_px", 1) % 1024 == 0
    ]
    return {
        "vram_squares": grid(("free VRAM", *WAYS.values()), squares),
        "vram_least": grid(("picture", *WAYS.values()), least),
    }


def charts(rows: Sequence[Row]) -> dict[str, str]:
    """Every file's text by its name."""
    return {
        f"vram{suffix}_{theme}.svg": draw(rows, words, theme)
        for suffix, words in LANGUAGES.items()
        for theme in THEMES
    }


def draw(rows: Sequence[Row], words: Words, theme: Theme) -> str:
    """The chart as SVG."""
    by_card = {row["card_gib"]: row for row in rows if "card_gib" in row}
    by_side = {row["side_px"]: row for row in rows if "side_px" in row}
    sides = {way: by_card[NAMED_GIB][f"{way}_largest_px"] for way in WAYS}
    told = {way: f"{by_side[TOLD_PX][f'{way}_least_bytes'] / GIB:.1f}" for way in WAYS}
    title = words.title.format(gib=NAMED_GIB, **sides)
    description = words.description.format(px=TOLD_PX, **told)
    drawing = Drawing(800, 572, title=title, description=description, theme=theme)
    scale = Scale(min(by_side), max(by_side))
    drawing.text(20, 34, title, size=19, is_bold=True)
    drawing.text(20, 58, words.subtitle, name="fill-soft")
    _axes(drawing, scale, words, list(by_card))
    _lines(drawing, scale, list(by_side.values()))
    for label in words.labels:
        drawing.text(
            scale.x(label.side_px), scale.y(label.gib * GIB), label.text, size=label.size,
            name=f"fill-{label.colour} halo", anchor=label.anchor, is_bold=label.is_bold,
        )  # fmt: skip
    for way, colour in BOTH.items():
        x, y = scale.x(sides[way]), scale.y(NAMED_GIB * GIB)
        drawing.dot(x, y, 6, f"fill-{colour}")
        size = f"{sides[way]}×{sides[way]}"
        drawing.text(x - 10, y - 9, size, size=14, is_bold=True, anchor="end", name="fill-ink halo")
    measured = [row for row in rows if "measured_on" in row]
    _points(drawing, scale, measured)
    device = ", ".join(dict.fromkeys(row["measured_on"] for row in measured))
    known = {
        "gib": NAMED_GIB, **sides,
        **{name: by_card[NAMED_GIB][name] for name in ("host", "dtype", "text_tokens")},
        "source": words.measured.format(device=device) if device else words.not_measured,
    }  # fmt: skip
    for number, line in enumerate(words.small):
        drawing.text(20, 512 + 16 * number, line.format(**known), size=11, name="fill-soft")
    return drawing.render()


class Scale(NamedTuple):
    """Pixels of the drawing for a picture's side and for bytes."""

    first_px: int
    last_px: int
    left: float = 44
    right: float = 706
    top: float = 98
    bottom: float = 446
    most_bytes: int = 26 * GIB

    def x(self, side_px: float) -> float:
        share = (side_px - self.first_px) / (self.last_px - self.first_px)
        return self.left + share * (self.right - self.left)

    def y(self, count: float) -> float:
        return self.bottom - count / self.most_bytes * (self.bottom - self.top)

    def curve(self, rows: Sequence[Row], field: str) -> list[tuple[float, float]]:
        """The points of a line, up to where it leaves the chart."""
        points = [(row["side_px"], row[field]) for row in rows]
        inside, most = [(self.x(points[0][0]), self.y(points[0][1]))], self.most_bytes
        for (side, count), (after, above) in itertools.pairwise(points):
            if above > most:
                left_at = side + (after - side) * (most - count) / (above - count)
                return [*inside, (self.x(left_at), self.y(most))]
            inside.append((self.x(after), self.y(above)))
        return inside


def _axes(drawing: Drawing, scale: Scale, words: Words, cards_gib: Sequence[int]) -> None:
    for gib_of in (0, *cards_gib):
        y, is_named = scale.y(gib_of * GIB), gib_of == NAMED_GIB
        name = "line-soft" if is_named or not gib_of else "line-grid"
        width = 1.6 if is_named else 1
        drawing.line(scale.left, y, scale.right, y, name, stroke_width=width)
        drawing.text(scale.left - 8, y + 4.5, f"{gib_of}", anchor="end", name="fill-soft")
        if gib_of:
            name = "fill-ink" if is_named else "fill-soft"
            card = words.card.format(gib=gib_of)
            drawing.text(scale.right + 8, y + 4.5, card, is_bold=is_named, name=name)
    drawing.text(20, scale.top - 12, "GiB", name="fill-soft")
    for side in range(scale.first_px, scale.last_px + 1, 512):
        x = scale.x(side)
        drawing.line(x, scale.bottom, x, scale.bottom + 5, "line-soft")
        drawing.text(x, scale.bottom + 20, f"{side}", anchor="middle", name="fill-soft")
    middle = (scale.left + scale.right) / 2
    drawing.text(middle, scale.bottom + 39, words.axis, anchor="middle", name="fill-soft")


def _lines(drawing: Drawing, scale: Scale, rows: Sequence[Row]) -> None:
    """Dashed: all weights on the card; thin: the smallest settings; thick: what is compared."""
    for way, colour in BOTH.items():
        curve = scale.curve(rows, f"{way}_resident_bytes")
        drawing.path(curve, f"line-{colour}", stroke_width=1.2, stroke_dasharray="5 4")
    drawing.path(scale.curve(rows, "smallest_least_bytes"), "line-ours", stroke_width=1.5)
    for way, colour in BOTH.items():
        curve = scale.curve(rows, f"{way}_least_bytes")
        drawing.path(curve, f"line-{colour}", stroke_width=3.5, stroke_linecap="round")


def _points(drawing: Drawing, scale: Scale, measured: Sequence[Row]) -> None:
    """Measured runs at the height of their card: rings, and crosses without a whole picture."""
    for row in measured:
        if row["on_gib"] * GIB > scale.most_bytes:
            continue
        # Both ways of a picture on a card are beside each other.
        x = scale.x(row["measured_px"]) + (-6 if row["way"] == "alone" else 6)
        y, name = scale.y(row["on_gib"] * GIB), f"line-{BOTH[row['way']]}"
        if row["is_whole"]:
            drawing.dot(x, y, 5, name, stroke_width=2)
        else:
            for tilt in (-5, 5):
                drawing.line(x - 5, y - tilt, x + 5, y + tilt, name, stroke_width=2)
