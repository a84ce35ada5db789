"""Texts for users: the help pages quote messages that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pack.runner.live_host import REPO

DOCS = REPO / "js" / "docs"
PAGES = sorted(DOCS.glob("*.md"))
LABEL = re.compile(r"\*\*(.+?)\*\*")


def literals(source: str) -> Iterator[str]:
    """Every string of a module, f-strings in the pieces between their values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def messages(page: Path) -> list[str]:
    """What stands in bold at the start of the points that explain messages, errors and states."""
    found, section = [], ""
    for line in page.read_text("utf-8").splitlines():
        if line.startswith("## "):
            section = line
        elif line.startswith("- **") and re.search("What an? (message|error)", section):
            label = line.split("**: ")[0] + "**"
            found += LABEL.findall(label)
    return found


def said() -> str:
    """Every string of the nodes and of the page."""
    texts = [path.read_text("utf-8") for path in sorted((REPO / "nodes").rglob("*.py"))]
    page = (REPO / "locales" / "en" / "main.json").read_text("utf-8")
    return "\n".join([*(text for source in texts for text in literals(source)), page])


def missing(quotes: list[str], text: str) -> list[str]:
    """The parts between "..." that nothing says."""
    parts = (part.strip(" ,;:") for quote in quotes for part in quote.split("..."))
    return [part for part in parts if part not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_help_explains_messages_that_exist(page):
    quotes = messages(page)
    assert quotes or page.stem == "ZImageVRAMProbe"
    assert missing(quotes, said()) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_both_languages_quote_the_same_messages(page):
    chinese = LABEL.findall((page.with_suffix("") / "zh.md").read_text("utf-8"))
    translated = {"No plan: ..."}  # by locales/
    assert [q for q in messages(page) if q not in chinese and q not in translated] == []


def test_a_wrong_quote_is_seen():
    text = "\n".join(literals('f"{name} holds no scores"\n"no " "plan"'))
    assert missing(["... holds no scores", "no plan: ..."], text) == []
    assert missing(["... keeps no scores"], text) == ["keeps no scores"]
