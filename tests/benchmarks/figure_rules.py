"""Rules on the figures of the documents: each gives what breaks it."""

# ruff: noqa: RUF001 (Chinese punctuation and the sign between sides)

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set

from pack.tests.benchmarks.quoted import Cell, Quote
from pack.tests.benchmarks.settings import SETTINGS, page_of, settings_of

# A number and its unit, or the sides of a picture.
FIGURE = re.compile(
    r"(?<![\w.])(?:(?P<sides>\d+ ?[x×] ?\d+)|(?P<number>\d[\d,]*(?:\.\d+)?)(?: |-|&nbsp;)?"
    r"(?P<unit>[KMGT]i?B(?:/s)?|%|px|dB|ms|us|µs|s|seconds?|min|minutes?|h|hours?|x|×|times"
    r"|(?:个 ?)?tokens?|像素|毫秒|秒|分钟|小时|倍))(?![A-Za-z0-9_])"
)
UNITS = {
    **{"秒": "s", "second": "s", "seconds": "s", "毫秒": "ms", "µs": "us"},
    **{"分钟": "min", "minute": "min", "minutes": "min", "小时": "h", "hour": "h", "hours": "h"},
    **{"倍": "x", "×": "x", "times": "x", "像素": "px"},
    **{"token": "tokens", "个token": "tokens", "个 token": "tokens"},
}
# "946 / 514 / 284 MiB" is three figures.
SHARED_UNIT = re.compile(r"(?<![\w.])((?:\d+(?:\.\d+)? / )+)\d+(?:\.\d+)? ([KMGT]iB)")
SENTENCE_END = re.compile(r"(?<=[.!?])\s|[。！？]|\n\s*\n|\n(?=[|-])")


def figures(text: str) -> Iterator[str]:
    """Every number with its unit, as the tables write it: "467.4 MiB", "1.25x", "512x512"."""
    for found in SHARED_UNIT.finditer(text):
        yield from (f"{number} {found[2]}" for number in found[1].split(" / ")[:-1])
    yield from map(_figure, FIGURE.finditer(text))


def _figure(found: re.Match[str]) -> str:
    if found["sides"]:
        return found["sides"].replace("×", "x").replace(" ", "")
    unit = UNITS.get(found["unit"], found["unit"])
    return f"{found['number']}{unit}" if unit == "x" else f"{found['number']} {unit}"


def without_tables(markdown: str) -> str:
    """A document without its generated tables."""
    return re.sub(r"^<!-- (\w+):begin -->\n.*?^<!-- \1:end -->$", "", markdown, flags=re.M | re.S)


def prose(markdown: str) -> str:
    """A document without its generated tables and its blocks of code."""
    text = re.sub(r"^```.*?^```$", "", without_tables(markdown), flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def counted(markdown: str) -> Counter[str]:
    """The figures of a document's prose, and how often it gives each."""
    return Counter(figures(prose(markdown)))


def cell(tables: Mapping[str, str], place: Cell) -> str:
    """What a table says in a cell.

    Raises:
        ValueError: it has no such cell, or several.
    """
    lines = [
        [cell.strip() for cell in line[1:-1].split(" | ")]
        for line in tables.get(place.table, "").splitlines()
        if line.startswith("|")
    ]
    mine = [line for line in lines[2:] if set(place.line) <= set(line)]
    if len(mine) != 1 or place.column not in lines[0]:
        raise ValueError(f"{place} is not one cell")
    return mine[0][lines[0].index(place.column)]


def unfounded(
    quoted: Mapping[str, Quote], tables: Mapping[str, str], documents: Mapping[str, str]
) -> list[str]:
    """Figures in prose that no cell prints, and cells that print another figure."""
    wrong = [
        f"{name}: {figure}: name the cell that prints it in tests/benchmarks/quoted.py, "
        "or what it is in settings.py"
        for name, text in documents.items()
        for figure in sorted(counted(text).keys() - quoted.keys() - settings_of(name).keys())
    ]
    for figure, (place, *_) in quoted.items():
        printed = cell(tables, place)
        # A square is printed by its side.
        side = re.sub(r"^(\d+)x\1$", r"\1 px", figure)
        if not {figure, side} & set(figures(printed)):
            wrong.append(f"{figure}: {place.table} prints {printed}")
    return wrong


def misplaced(quoted: Mapping[str, Quote], documents: Mapping[str, str]) -> list[str]:
    """Quoted figures in a sentence that is not about them."""
    wrong = []
    for name, text in documents.items():
        for sentence in SENTENCE_END.split(prose(text)):
            for figure in sorted(set(figures(sentence)) & quoted.keys()):
                words = quoted[figure].chinese if _is_chinese(name) else quoted[figure].english
                if not any(_says(sentence, some.format(figure)) for some in words):
                    wrong.append(f"{name}: {figure} not in a sentence with {' or '.join(words)}")
    return wrong


def _says(sentence: str, words: str) -> bool:
    pattern = ".*".join(map(re.escape, _marked(words).split("…")))
    return re.search(pattern, _marked(sentence)) is not None


def _marked(text: str) -> str:
    """A sentence without spaces and with «» around its figures, each as the tables write it."""
    return re.sub(r"\s", "", FIGURE.sub(lambda found: f"«{_figure(found)}»", text))


def _is_chinese(name: str) -> bool:
    return name.endswith("zh.md")


def unused(names: Set[str], documents: Mapping[str, str]) -> list[str]:
    """Named figures that no document has."""
    return sorted(names - {figure for text in documents.values() for figure in counted(text)})


def unused_settings(documents: Mapping[str, str]) -> list[str]:
    """Settings that neither language of their page has."""
    return [
        f"{page}: {figure}"
        for page, known in SETTINGS.items()
        for figure in unused(
            known.keys(), {name: text for name, text in documents.items() if page_of(name) == page}
        )
    ]


def twice(names: Set[str], documents: Mapping[str, str]) -> list[str]:
    """Named figures that stand in the prose of two documents, and tables that stand in two."""
    kinds: tuple[Callable[[str], Set[str]], ...] = (
        lambda text: counted(text).keys() & names,
        lambda text: {f"table {name}" for name in re.findall(r"^<!-- (\w+):begin", text, re.M)},
    )
    return [
        f"{what} stands in {' and in '.join(where)}"
        for kind in kinds
        for what, where in _by_document(documents, kind).items()
        if len(where) > 1
    ]


def _by_document(
    documents: Mapping[str, str], kind: Callable[[str], Set[str]]
) -> dict[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for name, text in documents.items():
        for what in sorted(kind(text)):
            found.setdefault(what, []).append(name)
    return dict(found)
