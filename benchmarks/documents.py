"""Writes the tables of the stored rows into the documents.

    python -m benchmarks.documents [--check]

A table goes between the lines `<!-- NAME:begin -->` and `<!-- NAME:end -->`, in the language of the
document; NAME is a key of `blocks`. `--check` writes nothing and exits with 1 if a document would
change. Standard library only.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from . import shown
from .rows import REPO, Row, read
from .shown import by_card, cards, measured_with
from .shown.words import CHINESE, ENGLISH, Words

RESULTS = Path("benchmarks") / "results"
FOLDERS = (".", "docs")
LANGUAGES = {"en": ENGLISH, "zh": CHINESE}
MARK = re.compile(r"^<!-- (?P<name>\w+):(?P<end>begin|end) -->$", re.MULTILINE)
# What is meant as one, outside of code.
MEANT = re.compile(r"^.*<!-.*\b(?:begin|end)\b.*$", re.MULTILINE | re.IGNORECASE)
CODE = re.compile(r"`[^`\n]*`")


def script_tables(of: Callable[[str], list[Row]]) -> dict[str, dict[str, str]]:
    """What each script prints of its stored rows: by script, by name of the table.

    Args:
        of: the rows of a script.
    """
    modules: Mapping[str, ModuleType] = shown.scripts()
    return {name: module.tables(of(name)) for name, module in modules.items()}


def blocks(repo: Path, words: Words) -> dict[str, str]:
    """Every table by its name, as Markdown of one language.

    Raises:
        ValueError: rows of a card cannot be published.
    """
    folder = repo / RESULTS

    def of(name: str) -> list[Row]:
        return read(folder / f"{name}.jsonl")

    found = cards.load(folder / "cards")
    made = {name: text for tables in script_tables(of).values() for name, text in tables.items()}
    return {
        **made,
        "measured_with": measured_with.section({name: of(name) for name in shown.scripts()}),
        "cards": cards.section(found, words),
        "by_card": by_card.section(of("fit_table"), of("vram_chart"), found, words),
    }


def documents(repo: Path) -> Iterator[Path]:
    """Every document that may have tables, below the repository's root."""
    for folder in FOLDERS:
        yield from sorted(path.relative_to(repo) for path in (repo / folder).glob("*.md"))


def language_of(document: Path) -> str:
    return "zh" if document.name.endswith(".zh.md") else "en"


def names_in(text: str, document: str) -> list[str]:
    """The tables that a document has a place for.

    Raises:
        ValueError: a marker is mistyped, or markers are not in pairs, each begin before its end.
    """
    for line in MEANT.findall(CODE.sub("", text)):
        if not MARK.fullmatch(line):
            raise ValueError(f"{document}: not <!-- NAME:begin --> or <!-- NAME:end -->: {line!r}")
    marks = [(mark["name"], mark["end"]) for mark in MARK.finditer(text)]
    names = [name for name, _ in marks[::2]]
    if marks != [(name, end) for name in names for end in ("begin", "end")]:
        raise ValueError(f"{document}: each line <!-- NAME:begin --> needs its <!-- NAME:end -->")
    if len(set(names)) < len(names):
        raise ValueError(f"{document}: a table has more than one place")
    return names


def filled(text: str, made: Mapping[str, str], document: Path) -> str:
    """A document with what is between its markers replaced.

    Raises:
        ValueError: its markers are not in pairs, or name a table that there is not.
    """
    for name in names_in(text, f"{document}"):
        if name not in made:
            raise ValueError(f"{document}: no table {name}; there are: {', '.join(sorted(made))}")
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        # Links of a table are written as from the repository's root.
        table = made[name].replace("](../", f"]({'../' * len(document.parts)}")
        text = f"{before}{begin}{table}{end}{rest.partition(end)[2]}"
    return text


def main(argv: Sequence[str], repo: Path = REPO) -> int:
    parser = argparse.ArgumentParser(description="The tables of the documents.")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one would change")
    options = parser.parse_args(argv)
    try:
        made = {name: blocks(repo, words) for name, words in LANGUAGES.items()}
        texts = {path: (repo / path).read_text(encoding="utf-8") for path in documents(repo)}
        new = {path: filled(text, made[language_of(path)], path) for path, text in texts.items()}
    except ValueError as error:
        print(f"documents: {error}", file=sys.stderr)
        return 1
    differing = [path for path in texts if new[path] != texts[path]]
    for path in () if options.check else differing:
        (repo / path).write_text(new[path], encoding="utf-8", newline="\n")
    if differing:
        names = ", ".join(map(str, differing))
        print(f"{names}: {'out of date' if options.check else 'written'}")
    return 1 if differing and options.check else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
