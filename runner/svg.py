"""Writes SVG charts in the pack's colours, light or dark. Standard library only."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from ..nodes.probe.chart import PALETTE

Theme = Literal["light", "dark"]
Attribute = str | float
FONTS = (
    "system-ui, -apple-system, 'Segoe UI', 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', "
    "sans-serif"
)
_PARTS = PALETTE["parts"]
# What is drawn by each colour; "ours" and "alone" are the pack and ComfyUI without it.
_ALARM = PALETTE["alarm"]
_SHARED = {"ours": _PARTS["weights"], "alone": _ALARM, "alarm": _ALARM, **_PARTS}
COLOURS: dict[Theme, dict[str, str]] = {
    "light": {
        "ground": "#ffffff", "ink": PALETTE["ground"], "soft": "#5a606c", "grid": "#d5d9e0",
        **_SHARED,
    },
    "dark": {
        "ground": PALETTE["ground"], "ink": PALETTE["ink"], "soft": "#a4aab6", "grid": "#454a54",
        **_SHARED,
    },
}  # fmt: skip


def style(theme: Theme | None) -> str:
    """Rules for the classes fill-NAME, line-NAME and halo, which keeps lines off a text.

    None: the reader's theme decides.
    """
    if theme is not None:
        return _rules(COLOURS[theme])
    light, dark = (_rules(COLOURS[each]) for each in ("light", "dark"))
    return f"{light}@media(prefers-color-scheme:dark){{\n{dark}}}\n"


def _rules(colours: Mapping[str, str]) -> str:
    halo = "paint-order:stroke;stroke-width:5px;stroke-linejoin:round"
    return f".halo{{stroke:{colours['ground']};{halo}}}\n" + "".join(
        f".fill-{name}{{fill:{value}}}.line-{name}{{stroke:{value};fill:none}}\n"
        for name, value in colours.items()
    )


class Drawing:
    """Shapes in the order in which they are drawn, on a ground with round corners.

    title, description: for a screen reader.
    """

    def __init__(
        self, width: int, height: int, *, title: str, description: str, theme: Theme | None
    ) -> None:
        self.width, self.height = width, height
        self._head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" font-family={quoteattr(FONTS)}>\n'
            f"<title>{escape(title)}</title>\n<desc>{escape(description)}</desc>\n"
            f"<style>\n{style(theme)}</style>"
        )
        self._shapes: list[str] = []
        self.box(0, 0, width, height, "fill-ground", rx=8)

    def box(
        self, x: float, y: float, width: float, height: float, name: str, **more: Attribute
    ) -> None:
        self._add("rect", {"x": x, "y": y, "width": width, "height": height}, name, more)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, name: str, **more: Attribute
    ) -> None:
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2}, name, more)

    def dot(self, x: float, y: float, radius: float, name: str, **more: Attribute) -> None:
        self._add("circle", {"cx": x, "cy": y, "r": radius}, name, more)

    def path(self, points: Iterable[Sequence[float]], name: str, **more: Attribute) -> None:
        """A line through points."""
        steps = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add("polyline", {"points": steps}, name, {"stroke-linejoin": "round", **more})

    def text(
        self, x: float, y: float, words: str, *, size: float = 13, name: str = "fill-ink",
        anchor: Literal["start", "middle", "end"] = "start", is_bold: bool = False,
        **more: Attribute,
    ) -> None:  # fmt: skip
        attributes: dict[str, Attribute] = {"x": x, "y": y, "font-size": size}
        if anchor != "start":
            attributes["text-anchor"] = anchor
        if is_bold:
            attributes["font-weight"] = 600
        self._add("text", attributes, name, more, escape(words))

    def render(self) -> str:
        """The file's text."""
        return "\n".join([self._head, *self._shapes, "</svg>\n"])

    def _add(
        self,
        tag: str,
        attributes: Mapping[str, Attribute],
        name: str,
        more: Mapping[str, Attribute],
        inside: str = "",
    ) -> None:
        given = {"class": name, **attributes, **{k.replace("_", "-"): v for k, v in more.items()}}
        words = " ".join(f"{key}={quoteattr(_number(value))}" for key, value in given.items())
        self._shapes.append(f"<{tag} {words}>{inside}</{tag}>" if inside else f"<{tag} {words}/>")


def _number(value: Attribute) -> str:
    """A number with at most one decimal, so that a file is short and the same everywhere."""
    return value if isinstance(value, str) else f"{round(value, 1):g}"


def stacked(charts: Sequence[str]) -> str:
    """Charts of one width below each other, as one SVG."""
    sizes = [re.search(r'width="(\d+)" height="(\d+)"', chart) for chart in charts]
    heights = [int(size[2]) if size else 0 for size in sizes]
    width, places = sizes[0][1] if sizes[0] else "0", itertools.accumulate([0, *heights[:-1]])
    inside = "".join(
        chart.replace("<svg ", f'<svg y="{place}" ', 1)
        for chart, place in zip(charts, places, strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {sum(heights)}" '
        f'width="{width}" height="{sum(heights)}">\n{inside}</svg>\n'
    )
