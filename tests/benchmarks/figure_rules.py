"""Rules on the figures of the documents: each gives what breaks it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from pack.tests.benchmarks.quoted import Cell, is_setting

# A number and its unit; "2048x2048" has none.
FIGURE = re.compile(
    r"(?<![\w.])(?P<number>\d[\d,]*(?:\.\d+)?)"
    r"(?:x|(?: |&nbsp;)?(?P<unit>[KMG]i?B|%|ms|us|µs|s|dB|秒|毫秒|倍))(?![A-Za-z0-9_/])"
)
UNITS = {"秒": "s", "毫秒": "ms", "倍": "x", "µs": "us", None: "x"}
# "946 / 514 / 284 MiB" is three figures.
SHARED_UNIT = re.compile(r"(?<![\w.])((?:\d+(?:\.\d+)? / )+)\d+(?:\.\d+)? ([KMG]iB)")


def figures(text: str) -> Iterator[str]:
    """Every number with its unit, as the tables write it: "467.4 MiB", "1.25x"."""
    for found in SHARED_UNIT.finditer(text):
        yield from (f"{number} {found[2]}" for number in found[1].split(" / ")[:-1])
    for found in FIGURE.finditer(text):
        unit = UNITS.get(found["unit"], found["unit"])
        yield f"{found['number']}{unit}" if unit == "x" else f"{found['number']} {unit}"


def prose(markdown: str) -> str:
    """A document without its generated tables and its blocks of code."""
    text = re.sub(r"^<!-- (\w+):begin -->\n.*?^<!-- \1:end -->$", "", markdown, flags=re.M | re.S)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    return re.sub(r"^ {4}.*$", "", text, flags=re.M)


def quotes(markdown: str) -> set[str]:
    """The figures of its prose that are measurements or predictions."""
    return {figure for figure in figures(prose(markdown)) if not is_setting(figure)}


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
    quoted: Mapping[str, Cell], tables: Mapping[str, str], documents: Mapping[str, str]
) -> list[str]:
    """Figures in prose that no cell prints, and cells that print another figure."""
    wrong = [
        f"{name}: {figure}: name the cell that prints it in tests/benchmarks/quoted.py"
        for name, text in documents.items()
        for figure in sorted(quotes(text) - quoted.keys())
    ]
    for figure, place in quoted.items():
        if figure not in set(figures(printed := cell(tables, place))):
            wrong.append(f"{figure}: {place.table} prints {printed}")
    return wrong


def unused(quoted: Mapping[str, Cell], documents: Mapping[str, str]) -> list[str]:
    """Named cells whose figure no document quotes."""
    found = {figure for text in documents.values() for figure in quotes(text)}
    return sorted(quoted.keys() - found)


def twice(documents: Mapping[str, str]) -> list[str]:
    """Figures that stand in the prose of two documents, and tables that stand in two."""
    return [
        f"{what} stands in {' and in '.join(names)}"
        for kind in (quotes, _tables)
        for what, names in _by_document(documents, kind).items()
        if len(names) > 1
    ]


def _tables(markdown: str) -> set[str]:
    return {f"table {name}" for name in re.findall(r"^<!-- (\w+):begin -->$", markdown, re.M)}


def _by_document(documents: Mapping[str, str], kind: object) -> dict[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for name, text in documents.items():
        for what in sorted(kind(text)):  # type: ignore
            found.setdefault(what, []).append(name)
    return dict(found)
