"""The writer of SVG: what it escapes, its numbers, its themes."""

from __future__ import annotations

from xml.etree import ElementTree

from pack.runner import svg


def drawn(theme: svg.Theme | None = "light") -> svg.Drawing:
    return svg.Drawing(80, 40, title="a < b & c", description='"d"', theme=theme)


def test_words_are_escaped_and_the_title_is_for_screen_readers():
    drawing = drawn()
    drawing.text(1, 2, "x < y & z", is_bold=True, anchor="end")
    root = ElementTree.fromstring(drawing.render())
    name = root.tag.removesuffix("svg")
    assert [root.findtext(f"{name}{tag}") for tag in ("title", "desc", "text")] == [
        "a < b & c", '"d"', "x < y & z"
    ]  # fmt: skip
    assert root.get("role") == "img"


def test_numbers_have_at_most_one_decimal():
    drawing = drawn()
    drawing.path([(1 / 3, 2), (1000.06, 4.0)], "line-ours", stroke_width=1.25)
    assert 'points="0.3,2 1000.1,4"' in drawing.render()
    assert 'stroke-width="1.2"' in drawing.render()


def test_without_a_theme_the_readers_own_decides():
    text = drawn(None).render()
    light, dark = text.split("@media(prefers-color-scheme:dark){")
    for theme, part in (("light", light), ("dark", dark)):
        other = {"light": "dark", "dark": "light"}[theme]
        assert svg.COLOURS[theme]["soft"] in part
        assert svg.COLOURS[other]["soft"] not in part
    assert "@media" not in drawn("dark").render()
