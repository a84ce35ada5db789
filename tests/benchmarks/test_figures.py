"""Every figure in the prose of a document is printed by a script, and stands in one document.

What each rule refuses is shown at the end.
"""
# ruff: noqa: RUF001 (Chinese punctuation)

from __future__ import annotations

import pytest
from pack.benchmarks import documents
from pack.benchmarks.shown.words import ENGLISH
from pack.tests.architecture_rules import REPO
from pack.tests.architecture_rules import documents as read_documents
from pack.tests.benchmarks.figure_rules import (
    cell,
    counted,
    figures,
    misplaced,
    prose,
    twice,
    unfounded,
    unused,
    unused_settings,
)
from pack.tests.benchmarks.quoted import QUOTED, Cell, Quote
from pack.tests.benchmarks.settings import SETTINGS

# Printed by their scripts and in no document.
NOT_SHOWN = {"denoiser_peak_applied", "launches_encode", "vram_squares"}
TABLES = documents.blocks(REPO, ENGLISH)
# No rule for CHANGELOG.md: it tells what the scripts of each version printed, also of code that is
# gone, and what they print now stands in the other documents.
TEXTS = read_documents()
BY_LANGUAGE = {
    language: {
        name: text
        for name, text in TEXTS.items()
        if name.endswith("zh.md") == (language == "Chinese")
    }
    for language in ("English", "Chinese")
}
PAIRS = [(name, f"{name[:-3]}.zh.md") for name in TEXTS if f"{name[:-3]}.zh.md" in TEXTS]


def test_every_figure_of_a_text_is_printed_by_a_script():
    assert unfounded(QUOTED, TABLES, TEXTS) == []


def test_every_figure_stands_in_a_sentence_about_it():
    assert misplaced(QUOTED, TEXTS) == []


def test_every_named_cell_and_every_setting_is_quoted():
    assert unused(QUOTED.keys(), TEXTS) == []
    assert unused_settings(TEXTS) == []


@pytest.mark.parametrize("language", BY_LANGUAGE)
def test_no_figure_and_no_table_stands_in_two_documents(language):
    assert twice(QUOTED.keys(), BY_LANGUAGE[language]) == []


@pytest.mark.parametrize("names", PAIRS, ids=lambda names: names[0])
def test_both_languages_give_the_same_figures(names):
    english, chinese = (counted(TEXTS[name]) for name in names)
    assert english == chinese


def test_the_texts_are_found():
    assert TEXTS.keys() >= {"README.zh.md", "docs/how-it-works.md", "js/docs/ZImageLeanVAE/zh.md"}
    assert len(PAIRS) == 3


def test_every_table_stands_in_a_document():
    marks = [f"<!-- {name}:begin -->" for name in TABLES.keys() - NOT_SHOWN]
    english = "\n".join(BY_LANGUAGE["English"].values())
    assert [mark for mark in marks if mark not in english] == []
    assert TABLES.keys() >= NOT_SHOWN


TABLE = "| picture | ours |\n| --- | --- |\n| a | 12.5 MiB, 0.31x |\n| b | 7.0 MiB |\n"
PLACE = Cell("peaks", ("a",), "ours")
SAID = {"12.5 MiB": Quote(PLACE, ("It takes {}",), ("需要 {}",))}


class TestWhatTheRulesRefuse:
    def test_a_figure_that_no_cell_prints(self):
        assert unfounded(SAID, {"peaks": TABLE}, {"README.md": "It takes 12.5 MiB of 8 GiB."}) == []
        (wrong,) = unfounded({}, {}, {"README.md": "It takes 12.6 MiB of 8 GiB."})
        assert wrong.startswith("README.md: 12.6 MiB: name the cell")

    def test_a_setting_of_another_document(self):
        (wrong,) = unfounded({}, {}, {"README.zh.md": "2 GiB 或 20 GiB"})
        assert wrong.startswith("README.zh.md: 2 GiB: name the cell")

    def test_a_figure_whose_cell_has_changed(self):
        changed = {"12.6 MiB": SAID["12.5 MiB"]}
        (wrong,) = unfounded(changed, {"peaks": TABLE}, {})
        assert wrong == "12.6 MiB: peaks prints 12.5 MiB, 0.31x"

    @pytest.mark.parametrize("place", [PLACE._replace(line=("c",)), PLACE._replace(column="d"),
                                       PLACE._replace(table="e")])  # fmt: skip
    def test_a_cell_that_there_is_not(self, place):
        with pytest.raises(ValueError, match="is not one cell"):
            cell({"peaks": TABLE}, place)

    @pytest.mark.parametrize(
        ("name", "text", "is_right"),
        [
            ("README.md", "First.\nAt 512x512 it takes\n467.4 MiB instead of 1.5x.", True),
            ("README.md", "At 5120x512 it takes 467.4 MiB.", False),
            ("README.md", "At 512x512 it takes 1.5x instead of 467.4 MiB.", False),
            ("README.md", "At 512x512. It takes 467.4 MiB.", False),
            ("README.zh.md", "先说。512 × 512 需要 467.4 MiB，不是 1.5 倍", True),
            ("README.zh.md", "At 512x512 it takes 467.4 MiB.", False),
        ],
    )
    def test_a_figure_in_a_sentence_about_something_else(self, name, text, is_right):
        said = {"467.4 MiB": Quote(PLACE, ("512x512 … takes {}",), ("512x512 需要 {}",))}
        assert (misplaced(said, {name: text}) == []) == is_right

    def test_a_named_cell_that_nobody_quotes(self):
        assert unused(SAID.keys(), {"a.md": "It takes 12.6 MiB."}) == ["12.5 MiB"]
        said = " ".join(SETTINGS["docs/troubleshooting"])
        wrong = unused_settings({"docs/troubleshooting.zh.md": said})
        assert "README: 12 GB" in wrong
        assert not [line for line in wrong if line.startswith("docs/troubleshooting:")]

    def test_a_figure_or_a_table_in_two_documents(self):
        text = "It takes 12.5 MiB of 8 GiB.\n<!-- peaks:begin -->\n7.0 MiB\n<!-- peaks:end -->\n"
        assert twice(SAID.keys(), {"a.md": text, "b.md": "8 GiB"}) == []
        assert twice(SAID.keys(), {"a.md": text, "b.md": text}) == [
            "12.5 MiB stands in a.md and in b.md",
            "table peaks stands in a.md and in b.md",
        ]

    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("467.4 MiB, 1.25x and 0.02 %.", ["467.4 MiB", "1.25x", "0.02 %"]),
            ("| 946 / 514 / 284 MiB |", ["946 MiB", "514 MiB", "284 MiB"]),
            ("2048x2048, 2 × 2, 0.30.0, 5 samples", ["2048x2048", "2x2"]),
            (
                "慢 1.25 倍，0.2 秒，5 毫秒，467.4 MiB的显存，512 个 token，3 分钟，16 像素",
                ["1.25x", "0.2 s", "5 ms", "467.4 MiB", "512 tokens", "3 min", "16 px"],
            ),
            ("28 us (3.60 s), 31.8 dB", ["28 us", "3.60 s", "31.8 dB"]),
            ("1.5 TiB, 25 GB/s, 64 px", ["1.5 TiB", "25 GB/s", "64 px"]),
            ("9.9 GiB/step, 9.9 s/step, 8-GiB card", ["9.9 GiB", "9.9 s", "8 GiB"]),
            ("9.99×, 3 times, 1.5 x", ["9.99x", "3x", "1.5x"]),
            ("0.2 seconds, 3 minutes, 2 h, 1 token", ["0.2 s", "3 min", "2 h", "1 tokens"]),
        ],
    )
    def test_figures_are_found(self, text, found):
        assert sorted(figures(text)) == sorted(found)

    def test_tables_and_code_are_no_prose(self):
        table = "<!-- peaks:begin -->\n| 1.5 MiB |\n<!-- peaks:end -->"
        text = f"2.5 MiB\n{table}\n```\n3.5 MiB\n```\n\n    4.5 MiB\n\n`5.5 MiB`\n"
        assert counted(text) == {"2.5 MiB": 1, "5.5 MiB": 1}
        assert "peaks" not in prose(text)

    def test_no_measurement_is_a_setting(self):
        assert [name for name, known in SETTINGS.items() if QUOTED.keys() & known.keys()] == []
