"""The READMEs: short, the same in both languages, and true about what they name."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

import pytest
from pack.tests.architecture_rules import REPO, read
from pack.tests.test_links import headings_of, links_of

READMES = ("README.md", "README.zh.md")
MOST_LINES = 150
TROUBLES = ("docs/troubleshooting.md", "docs/troubleshooting.zh.md")
HOW = ("docs/how-it-works.md", "docs/how-it-works.zh.md")
WORKFLOWS = sorted(path.stem for path in (REPO / "example_workflows").glob("*.json"))


def _text(name: str) -> str:
    return read(PurePosixPath(name))


def _shape(markdown: str) -> list[str]:
    """What a text is made of, line by line: headings, rows of tables, items, commands."""
    kinds = re.findall(r"^(#+ |\|(?=.)|\d+\. |- | {4}(?=\S))", markdown, re.MULTILINE)
    return [kind.strip() or "code" for kind in kinds]


def _same_in_chinese(link: str, folder: PurePosixPath) -> str:
    """Where a link of a Chinese text leads in the English one: to the heading at the same place."""
    page, _, heading = link.partition("#")
    english = page.replace("_zh_", "_").replace(".zh.md", ".md")
    if heading and page != english:
        place = _headings(f"{folder / page}").index(heading)
        heading = _headings(f"{folder / english}")[place]
    return f"{english}#{heading}" if heading else english


def _headings(name: str) -> list[str]:
    """Where links lead in a text, in order."""
    return [where for line in _text(name).splitlines() for where in headings_of(line)]


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_short(name):
    assert len(_text(name).splitlines()) <= MOST_LINES


@pytest.mark.parametrize("names", [READMES, TROUBLES, HOW], ids=lambda names: Path(names[0]).stem)
def test_both_languages_say_the_same(names):
    english, chinese = (_text(name) for name in names)
    assert _shape(english) == _shape(chinese)
    assert len(_shape(english)) > 20
    own = {Path(name).name for name in names}
    links = [
        [link for link in links_of(text) if link not in own and link[0] != "#"]
        for text in (english, chinese)
    ]
    folder = PurePosixPath(names[0]).parent
    assert links[0] == [_same_in_chinese(link, folder) for link in links[1]]
    addresses = [re.findall(r"https:[^)\s]+", text) for text in (english, chinese)]
    assert addresses[0] == addresses[1]


@pytest.mark.parametrize("name", READMES)
def test_every_workflow_is_named(name):
    assert [workflow for workflow in WORKFLOWS if f"`{workflow}`" not in _text(name)] == []


@pytest.mark.parametrize(("name", "language"), [(READMES[0], "en"), (READMES[1], "zh")])
def test_every_node_is_named_as_the_page_shows_it(name, language):
    if language == "zh":
        nodes = json.loads(_text("locales/zh/nodeDefs.json")).values()
        shown = [node["display_name"] for node in nodes]
    else:
        sources = [read(PurePosixPath(f"nodes/{p.name}")) for p in (REPO / "nodes").glob("*.py")]
        shown = re.findall(r'display_name="([^"]+)",\n\s+category=', "\n".join(sources))
    assert len(shown) == 6
    text = _text(name)
    assert [title for title in shown if f"**{title}**" not in text] == []


@pytest.mark.parametrize("name", READMES)
def test_a_plain_viewer_shows_every_picture(name):
    """Where `picture` is not known, the `img` inside of it is shown; each tells what is on it."""
    pictures = re.findall(r"<picture>(.*?)</picture>", _text(name), re.DOTALL)
    assert pictures
    assert all(len(re.findall(r'<img [^>]*alt="[^"]{40,}"', inside)) == 1 for inside in pictures)
    assert re.findall(r"!\[\]\(", _text(name)) == []


def test_the_shape_tells_texts_apart():
    assert _shape("# A\n\n| b |\n|---|\n- c\n1. d\n\n    e\n") == ["#", "|", "|", "-", "1.", "code"]
    assert _shape("# A\n- c\n") != _shape("# A\n- c\n- d\n")


def test_a_link_to_a_chinese_heading_is_one_to_the_english_heading_at_its_place():
    link = _same_in_chinese("docs/how-it-works.zh.md#什么是精确的", PurePosixPath("."))
    assert link == "docs/how-it-works.md#what-is-exact"
