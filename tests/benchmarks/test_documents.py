"""The tables of the documents are those of the stored rows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pack.benchmarks import documents
from pack.benchmarks.card import tables
from pack.benchmarks.rows import read, write
from pack.benchmarks.shown.words import CHINESE, ENGLISH
from pack.tests.architecture_rules import REPO
from pack.tests.benchmarks.card_rows import FIT, GIB, OURS, campaign, fill, step, whole

CARDS = documents.RESULTS / "cards"
MARKED = "before\n\n<!-- {0}:begin -->\n<!-- {0}:end -->\n\nafter\n"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """The stored rows without those of cards, and documents of both languages."""
    (tmp_path / documents.RESULTS).mkdir(parents=True)
    for path in (REPO / documents.RESULTS).glob("*.jsonl"):
        shutil.copy(path, tmp_path / documents.RESULTS)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "README.zh.md", "docs/more.md"):
        (tmp_path / name).write_text(MARKED.format("cards"), encoding="utf-8")
    return tmp_path


def body_of(repo: Path, name: str = "README.md", table: str = "cards") -> str:
    text = (repo / name).read_text(encoding="utf-8")
    _, _, rest = text.partition(f"<!-- {table}:begin -->\n")
    return rest.partition(f"<!-- {table}:end -->")[0].strip("\n")


def cells_of(table: str) -> list[tuple[str, ...]]:
    """The lines of a table without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[2:]]


def documents_of_the_repository() -> list[Path]:
    return [REPO / path for path in documents.documents(REPO)]


class TestTheRepository:
    def test_is_up_to_date(self, capsys):
        assert documents.main(["--check"]) == 0, capsys.readouterr().out

    def test_every_picture_of_the_documents_is_shown(self):
        names = {path.name for path in (REPO / "docs" / "pictures").iterdir()}
        texts = [path.read_text(encoding="utf-8") for path in documents_of_the_repository()]
        assert {name for name in names if not any(f"pictures/{name}" in t for t in texts)} == set()
        assert not list((REPO / documents.RESULTS).glob("*.png"))

    def test_its_tables_need_neither_torch_nor_a_host(self):
        code = "import sys; from benchmarks import documents as d; d.main(['--check'])\n"
        code += "assert not {'torch', 'comfy', 'numpy'} & sys.modules.keys()"
        done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()


class TestMain:
    def test_fills_every_document_once_and_leaves_the_rest(self, repo, capsys):
        assert documents.main(["--check"], repo) == 1
        assert "README.md, README.zh.md, docs/more.md: out of date" in capsys.readouterr().out
        assert body_of(repo) == ""
        assert documents.main([], repo) == 0
        text = (repo / "README.md").read_text(encoding="utf-8")
        assert text.startswith("before\n\n<!-- cards:begin -->\n") and text.endswith("\n\nafter\n")
        assert documents.main(["--check"], repo) == 0

    def test_every_table_can_be_placed(self, repo):
        for name, made in documents.blocks(repo, ENGLISH).items():
            (repo / "docs" / f"{name}.md").write_text(MARKED.format(name), encoding="utf-8")
            assert made.endswith("\n")
        assert documents.main([], repo) == 0
        for name in documents.blocks(repo, ENGLISH):
            assert body_of(repo, f"docs/{name}.md", name)

    def test_a_link_leads_to_the_same_place_from_a_folder(self, repo):
        documents.main([], repo)
        assert "](../../issues/new" in body_of(repo)
        assert "](../../../issues/new" in body_of(repo, "docs/more.md")

    def test_a_changed_row_changes_the_document(self, repo):
        (repo / "docs" / "more.md").write_text(MARKED.format("load_ram"), encoding="utf-8")
        documents.main([], repo)
        before = body_of(repo, "docs/more.md", "load_ram")
        path = repo / documents.RESULTS / "load_ram.jsonl"
        path.write_text(path.read_text().replace('"peak_bytes": 7', '"peak_bytes": 8'))
        assert documents.main(["--check"], repo) == 1
        assert documents.main([], repo) == 0
        assert body_of(repo, "docs/more.md", "load_ram") != before

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("<!-- cards:begin -->\n", "each line <!-- NAME:begin --> needs its <!-- NAME:end -->"),
            ("<!-- cards:end -->\n<!-- cards:begin -->\n",
             "each line <!-- NAME:begin --> needs its <!-- NAME:end -->"),
            ("<!-- a:begin -->\n<!-- b:end -->\n",
             "each line <!-- NAME:begin --> needs its <!-- NAME:end -->"),
            (2 * MARKED.format("cards"), "a table has more than one place"),
            ("<!-- cards:begin --> \n<!-- cards:end --> \n",
             "not <!-- NAME:begin --> or <!-- NAME:end -->: '<!-- cards:begin --> '"),
            ("<!-- by-card:begin -->\n<!-- by-card:end -->\n",
             "not <!-- NAME:begin --> or <!-- NAME:end -->: '<!-- by-card:begin -->'"),
            ("<!--cards: Begin-->\n<!--cards: End-->\n",
             "not <!-- NAME:begin --> or <!-- NAME:end -->: '<!--cards: Begin-->'"),
            (MARKED.format("load_rams"), "no table load_rams; there are: added_peak, block_time"),
        ],
    )  # fmt: skip
    def test_says_which_document_has_wrong_markers(self, repo, capsys, text, told):
        (repo / "README.zh.md").write_text(text, encoding="utf-8")
        assert documents.main([], repo) == 1
        assert capsys.readouterr().err.startswith(f"documents: README.zh.md: {told}")
        assert body_of(repo) == ""

    def test_a_marker_in_code_is_none(self, repo):
        text = "Between `<!-- NAME:begin -->` and `<!-- NAME:end -->`.\n"
        assert documents.names_in(text, "x.md") == []

    @pytest.mark.parametrize("name", ["fit_table", "vram_chart"])
    def test_says_of_which_script_the_rows_are_missing(self, repo, capsys, name):
        (repo / documents.RESULTS / f"{name}.jsonl").unlink()
        assert documents.main([], repo) == 1
        assert capsys.readouterr().err == f"documents: no rows of {name} for 4 GiB\n"


class TestCards:
    def test_without_rows_one_sentence_says_how_to_make_one(self, repo):
        assert documents.main([], repo) == 0
        assert body_of(repo) == ENGLISH.nothing
        assert body_of(repo, "README.zh.md") == CHINESE.nothing
        assert "python run.py bench card" in ENGLISH.nothing

    def test_makes_lines_of_warm_runs_and_else_of_steps(self, repo):
        found = [*campaign(), step(tables.HOST, mib=1900, s=1.0, case="2048x2048x2")]
        fill(repo / CARDS, found, "a.jsonl")
        assert documents.main(["--check"], repo) == 1
        assert documents.main([], repo) == 0
        versions = "pack 0.1.0 4ef9b7b, ComfyUI 0.30.0, torch 2.11.0, driver 580.1, random weights"
        close = "99.70 % of 8-bit values equal, largest difference 2"
        assert cells_of(body_of(repo)) == [
            ("Card A", "512x512", "15.00 GiB / 8 s", "13.50 GiB / 8 s", close, versions),
            ("Card A", "1024x1024", "17.00 GiB / 8 s", "14.00 GiB / 8 s", close, versions),
            ("Card A, limited to 4 GiB", "1024x1024", "out of memory", "3.80 GiB / 11 s",
             "not measured", versions),
            ("Card A", "2048x2048", "29.00 GiB / 8 s", "17.00 GiB / 8 s", close, versions),
            ("Card A", "2048x2048, batch 2 (one step, Apply Gradient Checkpoint)",
             "1900.0 MiB / 1 s", "not measured", "not measured", versions),
        ]  # fmt: skip

    def test_what_we_gave_up_is_not_measured_and_not_failed(self, repo):
        given_up = {"gib": None, "s": None, "survived": None, "error": "not measured: our limit"}
        fill(repo / CARDS, [whole(FIT, **given_up)], "a.jsonl")
        assert documents.main([], repo) == 0
        assert "| not measured | not measured | not measured |" in body_of(repo)

    def test_is_the_same_the_second_time_and_in_any_order_of_rows(self, repo):
        fill(repo / CARDS, campaign(), "a.jsonl")
        assert documents.main([], repo) == 0
        names = ("README.md", "README.zh.md", "docs/more.md")
        made = {name: (repo / name).read_bytes() for name in names}
        fill(repo / CARDS, reversed(campaign()), "a.jsonl")
        assert documents.main([], repo) == 0
        assert documents.main(["--check"], repo) == 0
        assert {name: (repo / name).read_bytes() for name in made} == made

    def test_the_chinese_one_is_chinese(self, repo):
        fill(repo / CARDS, campaign(), "a.jsonl")
        documents.main([], repo)
        body = body_of(repo, "README.zh.md")
        assert "| 显存不足 |" in body
        assert all(word not in body for word in ("out of memory", "not measured", "random"))

    def test_refuses_rows_of_a_rehearsal(self, repo, capsys):
        fill(repo / CARDS, [step(OURS, mib=1, s=1.0, rehearsal=True)], "b.jsonl")
        assert documents.main([], repo) == 1
        told = capsys.readouterr().err
        assert told == "documents: b.jsonl holds rows of a rehearsal, which measured no card\n"
        assert body_of(repo) == ""


class TestByCard:
    @pytest.fixture
    def repo(self, repo: Path) -> Path:
        for name in ("README.md", "README.zh.md"):
            (repo / name).write_text(MARKED.format("by_card"), encoding="utf-8")
        return repo

    def test_says_what_is_planned_and_that_nothing_was_measured(self, repo):
        assert documents.main([], repo) == 0
        lines = cells_of(body_of(repo, table="by_card"))
        assert [line[0] for line in lines] == [f"{gib} GiB" for gib in (4, 6, 8, 12, 16)]
        assert {line[-1] for line in lines} == {"not measured"}
        assert lines[-1][4:6] == ("nothing", "nothing")
        assert all(int(line[1].split()[0]) < int(line[2].split()[0]) for line in lines)
        assert "not" not in body_of(repo, "README.zh.md", "by_card")

    @pytest.mark.parametrize(
        ("verdict", "english", "chinese"),
        [("tight", "tight", "勉强"), ("too large", "does not fit", "放不下")],
    )
    def test_says_of_what_does_not_fit_that_it_does_not(self, repo, verdict, english, chinese):
        path = repo / documents.RESULTS / "fit_table.jsonl"
        rows = read(path)
        for row in rows:
            if row.get("budget_gib") == 4 and row.get("width_px") == 2048:
                row["verdict"] = verdict
        write(path, rows)
        assert documents.main([], repo) == 0
        for name, told in (("README.md", english), ("README.zh.md", chinese)):
            first, second = cells_of(body_of(repo, name, "by_card"))[:2]
            assert first[5] == told and "GiB" in first[4] and "GiB" in second[5]

    def test_has_the_whole_runs_of_a_card_and_of_an_imitated_one(self, repo):
        real = [whole(FIT, gib=7.5, s=30.0, card_bytes=int(7.9 * GIB), case="2048x2048x1")]
        fill(repo / CARDS, [*campaign(), *real], "a.jsonl")
        assert documents.main([], repo) == 0
        last = {line[0]: line[-1] for line in cells_of(body_of(repo, table="by_card"))}
        assert last["4 GiB"] == "1024x1024: 3.80 GiB, 11 s (Card A)"
        assert last["8 GiB"] == "2048x2048: 7.50 GiB, 30 s (Card A)"
        assert last["16 GiB"] == "not measured"
