"""Texts for users: plain words, and help pages that quote messages which exist."""

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


# The everyday word instead: ComfyUI, estimate, again, reset, left unchanged, in pieces, card, MiB.
REFUSED = re.compile(
    r"\b(the host|this host|host's|reckons?|anew|shall|set back|in the place of|stays stock|"
    r"(is|are) lean|without a GPU|[MG]B of (RAM|VRAM|memory))\b",
    re.IGNORECASE,
)


def shown(source: str) -> list[str]:
    """The strings of a module that may be shown: of several words, and no docstring."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (node for node in ast.walk(tree) if id(node) not in bare)
    return [
        node.value
        for node in texts
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]


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


@pytest.mark.parametrize("folder", ["nodes", "runner"])
def test_messages_and_tooltips_use_plain_words(folder):
    sources = sorted((REPO / folder).rglob("*.py"))
    texts = [text for path in sources for text in shown(path.read_text("utf-8"))]
    assert len(texts) > 100
    assert [text for text in texts if REFUSED.search(text)] == []


def test_pages_use_plain_words():
    texts = [path.read_text("utf-8") for path in (*PAGES, REPO / "locales" / "en" / "main.json")]
    assert [found[0] for text in texts for found in REFUSED.finditer(text)] == []


def test_a_refused_word_is_seen():
    (text,) = shown('def f(x):\n    """The host."""\n    return f"the host refused {x}"')
    assert REFUSED.search(text)
