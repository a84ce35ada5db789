"""The texts that ComfyUI reads from locales/. What they must cover: tests/host/test_locales.py."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.runner.folder_links import PACK_NAME
from pack.runner.live_host import REPO
from pack.tests.chinese_rules import english

LOCALES = REPO / "locales"
DOCS = REPO / "js" / "docs"
FILES = sorted(LOCALES.glob("*/*"))
# What the host merges into its answer to /i18n; it ignores every other name.
READ_BY_HOST = {"main.json", "nodeDefs.json", "commands.json", "settings.json"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    else:
        assert isinstance(value, str)
        yield value


def _load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _display_name() -> str:
    # tomllib needs Python 3.11, and one line needs no parser.
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^DisplayName = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    return found[1]


def test_both_languages_are_there():
    assert {path.parent.name for path in FILES} == {"en", "zh"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_file_is_read_and_holds_plain_sentences(path):
    assert path.name in READ_BY_HOST
    texts = list(_texts(_load(path)))
    assert texts
    assert all(text.strip() == text and text for text in texts)
    # The page's message format gives these a meaning of their own.
    assert [text for text in texts if re.search(r"[{}@|]", text)] == []


def _by_key(value: Any, above: str = "") -> dict[str, str]:
    """Every text by the keys that lead to it."""
    if isinstance(value, str):
        return {above: value}
    parts = [_by_key(inner, f"{above}/{key}") for key, inner in value.items()]
    return {key: text for part in parts for key, text in part.items()}


@pytest.mark.parametrize("name", sorted({path.name for path in FILES} - {"nodeDefs.json"}))
def test_both_languages_have_the_same_keys_and_places(name):
    """The page shows English for a key that Chinese lacks, and "$1" for a place that has no value.

    nodeDefs.json is Chinese alone: tests/host/test_locales.py compares it with the schemas.
    """
    english, chinese = (_by_key(_load(LOCALES / language / name)) for language in ("en", "zh"))
    assert list(english) == list(chinese)
    places = re.compile(r"\$\d")
    for key, text in english.items():
        assert sorted(places.findall(text)) == sorted(places.findall(chinese[key])), key


def test_chinese_sentences_of_the_panels_are_chinese():
    texts = _by_key(_load(LOCALES / "zh" / "main.json"))
    assert {key: found for key, text in texts.items() if (found := english(text))} == {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ComfyUI 自己的代码 layers.12 KSampler 7.31 GiB 'none' cuda:0", []),
        ("ComfyUI's own, limited", ["own", "limited"]),
        ("prefer balance, 之后 after the blocks", ["after", "the", "blocks"]),
    ],
)
def test_english_words_are_seen(text, found):
    assert english(text) == found


# Which panel shows what these folders say; the others' texts are said by Fit to VRAM.
PROBE_FOLDERS = {"probe"}


def _said_by_the_server() -> Iterator[tuple[str, str, str]]:
    """Panel, key and English of each text that the page says in its own language."""
    for path in sorted((REPO / "nodes").rglob("*.py")):
        panel = "zImageVramProbe" if PROBE_FOLDERS & {*path.parts} else "zImageFitToVram"
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Words":
                key, english = (ast.literal_eval(given) for given in node.args[:2])
                yield panel, key, english


def test_the_server_and_the_page_say_the_same_english():
    """nodes/words.py: the page has a sentence for each text that it gets by key."""
    page = _load(LOCALES / "en" / "main.json")
    said = list(_said_by_the_server())
    assert len(said) > 60
    assert [one for one in said if page[one[0]].get(one[1]) != one[2]] == []


def test_english_node_texts_are_in_the_schema_alone():
    """The page falls back to the schema, so a second copy could only drift from it."""
    assert not (LOCALES / "en" / "nodeDefs.json").exists()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_templates_go_by_the_packs_name(language):
    categories = _load(LOCALES / language / "main.json")["templateWorkflows"]["category"]
    assert categories == {PACK_NAME: _display_name()}


def test_chinese_node_texts_are_chinese():
    for node in _load(LOCALES / "zh" / "nodeDefs.json").values():
        entries = [*node["inputs"].values(), *node["outputs"].values()]
        long_texts = [node["description"], *(entry["tooltip"] for entry in entries)]
        assert [text for text in long_texts if len(CHINESE.findall(text)) < 5] == []
        assert CHINESE.search(node["display_name"])


@pytest.mark.parametrize("node_id", sorted(_load(LOCALES / "zh" / "nodeDefs.json")))
def test_both_help_pages_have_the_same_parts(node_id):
    shapes = []
    for page in (DOCS / f"{node_id}.md", DOCS / node_id / "zh.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        shapes.append([line.split(" ")[0] for line in lines if re.match(r"#|- ", line)])
    assert shapes[0] == shapes[1]
    assert shapes[0].count("##") >= 3


def test_every_help_page_is_of_a_node():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.*")}
    nodes = _load(LOCALES / "zh" / "nodeDefs.json")
    assert pages == {page for node in nodes for page in (f"{node}.md", f"{node}/zh.md")}
