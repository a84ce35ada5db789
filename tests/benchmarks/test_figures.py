"""Every figure in the prose of a document is printed by a script, and stands in one document.

What each rule refuses is shown at the end.
"""
# ruff: noqa: RUF001 (Chinese punctuation)

from __future__ import annotations

import pytest
from pack.benchmarks import documents
from pack.benchmarks.shown.words import ENGLISH
from pack.tests.architecture_rules import REPO
from pack.tests.benchmarks.figure_rules import (
    cell,
    figures,
    prose,
    quotes,
    twice,
    unfounded,
    unused,
)
from pack.tests.benchmarks.quoted import QUOTED, Cell, is_setting

# Printed by their scripts and in no document.
NOT_SHOWN = {"denoiser_peak_applied", "launches_encode", "vram_squares"}
TABLES = documents.blocks(REPO, ENGLISH)
# What is new in a version is told once more there.
TEXTS = {
    path.as_posix(): (REPO / path).read_text(encoding="utf-8")
    for path in documents.documents(REPO)
    if path.name != "CHANGELOG.md"
}
BY_LANGUAGE = {
    language: {
        name: text
        for name, text in TEXTS.items()
        if name.endswith(".zh.md") == (language == "Chinese")
    }
    for language in ("English", "Chinese")
}


def test_every_figure_of_a_text_is_printed_by_a_script():
    assert unfounded(QUOTED, TABLES, TEXTS) == []


def test_every_named_cell_is_quoted():
    assert unused(QUOTED, TEXTS) == []


@pytest.mark.parametrize("language", BY_LANGUAGE)
def test_no_figure_and_no_table_stands_in_two_documents(language):
    assert twice(BY_LANGUAGE[language]) == []


def test_the_readmes_quote_the_same_figures():
    assert quotes(TEXTS["README.md"]) == quotes(TEXTS["README.zh.md"])


def test_every_table_stands_in_a_document():
    marks = [f"<!-- {name}:begin -->" for name in TABLES.keys() - NOT_SHOWN]
    english = "\n".join(BY_LANGUAGE["English"].values())
    assert [mark for mark in marks if mark not in english] == []
    assert TABLES.keys() >= NOT_SHOWN


TABLE = "| picture | ours |\n| --- | --- |\n| a | 12.5 MiB, 0.31x |\n| b | 7.0 MiB |\n"
PLACE = Cell("peaks", ("a",), "ours")


class TestWhatTheRulesRefuse:
    def test_a_figure_that_no_cell_prints(self):
        assert (
            unfounded({"12.5 MiB": PLACE}, {"peaks": TABLE}, {"a.md": "It takes 12.5 MiB."}) == []
        )
        (wrong,) = unfounded({}, {}, {"a.md": "It takes 12.6 MiB, or 8 GiB."})
        assert wrong.startswith("a.md: 12.6 MiB: name the cell")

    def test_a_figure_whose_cell_has_changed(self):
        wrong = unfounded({"12.6 MiB": PLACE}, {"peaks": TABLE}, {"a.md": "It takes 12.6 MiB."})
        assert wrong == ["12.6 MiB: peaks prints 12.5 MiB, 0.31x"]

    @pytest.mark.parametrize("place", [PLACE._replace(line=("c",)), PLACE._replace(column="d"),
                                       PLACE._replace(table="e")])  # fmt: skip
    def test_a_cell_that_there_is_not(self, place):
        with pytest.raises(ValueError, match="is not one cell"):
            cell({"peaks": TABLE}, place)

    def test_a_named_cell_that_nobody_quotes(self):
        assert unused({"12.5 MiB": PLACE}, {"a.md": "It takes 12.6 MiB."}) == ["12.5 MiB"]

    def test_a_figure_or_a_table_in_two_documents(self):
        text = "It takes 12.5 MiB of 8 GiB.\n<!-- peaks:begin -->\n7.0 MiB\n<!-- peaks:end -->\n"
        assert twice({"a.md": text, "b.md": "8 GiB"}) == []
        assert twice({"a.md": text, "b.md": text}) == [
            "12.5 MiB stands in a.md and in b.md",
            "table peaks stands in a.md and in b.md",
        ]

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("467.4 MiB, 1.25x and 0.02 %.", ["467.4 MiB", "1.25x", "0.02 %"]),
            ("| 946 / 514 / 284 MiB |", ["946 MiB", "514 MiB", "284 MiB"]),
            ("2048x2048, 2 x 2, 0.30.0, 5 samples, 25 GB/s", []),
            (
                "慢 1.25 倍，0.2 秒，5 毫秒，467.4 MiB的显存",
                ["1.25x", "0.2 s", "5 ms", "467.4 MiB"],
            ),
            ("28 us (3.60 s), 31.8 dB", ["28 us", "3.60 s", "31.8 dB"]),
        ],
    )
    def test_figures_are_found(self, text, found):
        assert sorted(figures(text)) == sorted(found)

    def test_tables_and_code_are_no_prose(self):
        table = "<!-- peaks:begin -->\n| 1.5 MiB |\n<!-- peaks:end -->"
        text = f"2.5 MiB\n{table}\n```\n3.5 MiB\n```\n\n    4.5 MiB\n\n`5.5 MiB`\n"
        assert quotes(text) == {"2.5 MiB", "5.5 MiB"}
        assert "peaks" not in prose(text)

    def test_settings_are_few_and_no_measurement_is_one(self):
        assert [figure for figure in QUOTED if is_setting(figure)] == []
        assert [f for f in ("8 GiB", "12 GB", "68 %", "128 MiB") if not is_setting(f)] == []
        assert [f for f in ("8.0 GiB", "467 MiB", "1.25x", "3 s") if is_setting(f)] == []
