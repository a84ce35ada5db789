"""The report and the plot of a campaign on a card, from invented rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pack.benchmarks.card import catalogue, plot, report, tables
from pack.benchmarks.shown.words import CHINESE, ENGLISH
from pack.tests.architecture_rules import REPO
from pack.tests.benchmarks.card_rows import (
    FIT,
    GIB,
    MIB,
    OURS,
    Row,
    campaign,
    ended,
    fill,
    row,
    step,
    whole,
)


def reported(folder: Path, *found: Row) -> str:
    report.write(fill(folder, found))
    return (folder / report.NAME).read_text(encoding="utf-8")


def line_of(text: str, *words: str) -> list[str]:
    """The cells of the one line of a table that has cells of these words."""
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    (line,) = [line for line in cells if set(words) <= set(line)]
    return line


class TestReport:
    def test_a_ratio_is_taken_within_a_round_and_not_across(self, tmp_path):
        """The card slows down to a tenth of its speed: each round says 2, the medians say 11."""
        text = reported(
            tmp_path,
            step(tables.HOST, 0, mib=400, s=1.0), step(OURS, 0, mib=100, s=2.0),
            step(tables.HOST, 1, mib=400, s=1.0), step(OURS, 2, mib=100, s=20.0),
            step(tables.HOST, 2, mib=400, s=10.0), step(OURS, 3, mib=100, s=30.0),
        )  # fmt: skip
        line = line_of(text, OURS, "1024x1024")
        assert line[3:7] == ["100.0 MiB", "0.25x", "20 s (2 s to 30 s)", "**2.00x**"]

    def test_rounds_of_two_runs_are_no_pair(self, tmp_path):
        text = reported(
            tmp_path,
            step(tables.HOST, mib=400, s=1.0), step(OURS, mib=100, s=3.0),
            step(tables.HOST, mib=400, s=4.0, run="r2"), step(OURS, mib=100, s=4.0, run="r2"),
        )  # fmt: skip
        assert line_of(text, OURS, "1024x1024")[6] == "**2.00x (1.00x to 3.00x)**"

    def test_training_is_compared_with_comfyuis_own_checkpointing(self, tmp_path):
        text = reported(tmp_path, *[one for one in campaign() if one["part"] == "training"])
        assert line_of(text, "512x512", "ComfyUI, depth 1")[3] == "2.00x"
        assert line_of(text, "512x512", OURS)[3] == "**1.00x**"

    def test_a_training_step_is_one_after_the_first(self, tmp_path):
        """The first pages weights in; it once stood under "a step"."""
        text = reported(tmp_path, *[one for one in campaign() if one["part"] == "training"])
        assert line_of(text, "512x512", OURS)[6:9] == ["2.7 s", "0.90x", "5 s"]
        assert "| time / depth 2's | a step, first one included |" in text

    @pytest.mark.parametrize("way", tables.NOT_OURS)
    def test_ways_that_are_not_ours_are_never_bold(self, tmp_path, way):
        host = row("vae", "decode", tables.HOST, seconds=1.0)
        text = reported(tmp_path, host, row("vae", "decode", f"{way}, slow", seconds=3.0))
        assert line_of(text, f"{way}, slow", "3 s")[5] == "3.00x"

    def test_the_names_of_ways_that_are_not_ours_are_those_of_the_parts(self):
        from pack.benchmarks.card.parts import tutorial, vae
        from pack.benchmarks.card.variants import HOST

        assert (HOST, *vae.TILE_NODES.values(), tutorial.CHECKPOINTED) == tables.NOT_OURS

    def test_no_table_has_two_columns_of_one_name(self):
        for table in report.TABLES:
            titles = [column.title for column in (*table.keys, *table.columns)]
            assert len(titles) == len(set(titles)), table.title

    def test_the_summary_stands_before_the_tables(self, tmp_path):
        folder = fill(tmp_path, campaign())
        summary = report.write(folder)
        before, _, _ = (folder / report.NAME).read_text(encoding="utf-8").partition("\n| ")
        assert f"```text\n{summary}\n```\n" in before

    def test_a_note_has_a_column_where_a_row_has_one_and_after_an_error_too(self, tmp_path):
        text = reported(
            tmp_path,
            step(tables.HOST, mib=2, s=1.0),
            step(OURS, mib=1, s=1.0, note="left to ComfyUI", error="out of memory"),
        )
        assert line_of(text, OURS, "1024x1024")[-2:] == ["left to ComfyUI", "out of memory"]
        assert line_of(text, tables.HOST, "1024x1024")[-2:] == ["", "no"]
        assert "| note |" not in reported(tmp_path, step(OURS, mib=1, s=1.0, note=None))

    def test_constants_have_a_meaning_or_else_their_name(self, tmp_path):
        text = reported(tmp_path, *campaign())
        assert line_of(text, "DENOISER_RESERVED")[-1].startswith("allocator and workspaces over")
        assert line_of(text, "A_NEW_ONE")[-1] == "A_NEW_ONE"

    def test_what_torch_counted_is_shown_even_if_it_is_wrong(self, tmp_path):
        figures = {"counted_bytes": 9 * MIB, "expected_bytes": 256 * MIB}
        wrong = row("sanity", "start", "allocator", **figures, error="RuntimeError: no")
        text = reported(tmp_path, wrong)
        line = ["dynamic VRAM", "cudaMallocAsync", "9.0 MiB", "256.0 MiB", "failed, see Errors"]
        assert line_of(text, "256.0 MiB") == line

    def test_what_we_gave_up_is_not_measured_and_not_failed(self, tmp_path):
        figures = {"gib": None, "s": None, "survived": None}
        found = [whole(FIT, **figures, error="not measured: the run took longer than 120 s")]
        summary = report.write(fill(tmp_path, found))
        text = (tmp_path / report.NAME).read_text(encoding="utf-8")
        assert "failed, see Errors" not in summary + text
        assert "| not measured: the run took longer than 120 s | budget," in text

    def test_without_a_partner_there_is_no_ratio(self, tmp_path):
        failed = step(tables.HOST, mib=5, s=9.0, error="out of memory")
        text = reported(tmp_path, failed, step(OURS, mib=100, s=2.0))
        assert line_of(text, OURS, "1024x1024")[3:7] == ["100.0 MiB", "-", "2 s", "-"]
        host = line_of(text, tables.HOST, "1024x1024")
        assert host[3:7] == ["not measured", "-", "not measured", "-"]
        assert host[-1] == "out of memory"

    @pytest.mark.parametrize(("s", "cell"), [(0.98, "0.98x"), (0.996, "**1.00x**")])
    def test_where_comfyui_is_equal_or_better_is_bold(self, tmp_path, s, cell):
        text = reported(tmp_path, step(tables.HOST, mib=2, s=1.0), step(OURS, mib=1, s=s))
        assert line_of(text, OURS, "1024x1024")[6] == cell
        assert line_of(text, tables.HOST, "1024x1024")[6] == "1.00x"

    def test_what_is_none_is_not_measured(self, tmp_path):
        text = reported(tmp_path, step(OURS, mib=1, s=1.0, reserved_bytes=None))
        assert line_of(text, OURS, "1024x1024")[8] == "not measured"
        assert "None" not in text

    def test_an_error_is_listed_once_with_all_that_met_it_and_no_path(self, tmp_path):
        folder = "/ho" + "me/me/models"  # so that no rule takes it for a path of this file's author
        told = f"RuntimeError: {folder}/x.safetensors | is short"
        text = reported(
            tmp_path,
            step(OURS, 0, mib=1, s=1.0, error=told),
            step(OURS, 1, mib=1, s=1.0, error=told),
            step(tables.HOST, 0, mib=1, s=1.0, error="out of memory"),
        )
        place = "denoiser, dynamic VRAM, 1024x1024"
        assert f"| RuntimeError: x.safetensors \\| is short | {place}, {OURS} |\n" in text
        assert f"| out of memory | {place}, {tables.HOST} |\n" in text
        assert "models" not in text

    def test_a_try_that_worked_later_is_no_failure_but_stays_in_the_list(self, tmp_path):
        text = reported(
            tmp_path,
            step(OURS, mib=1, s=1.0, error="out of memory"),
            step(OURS, mib=100, s=1.0, run="r2"),
        )
        assert line_of(text, OURS, "1024x1024")[3] == "100.0 MiB"
        assert "| failed |" not in text
        assert f"1024x1024, {OURS} (measured later) |" in text

    def test_two_cards_are_told_apart_and_never_compared(self, tmp_path):
        text = reported(
            tmp_path,
            step(tables.HOST, mib=400, s=1.0),
            step(OURS, mib=100, s=1.0, device="Card B", driver="590.2", run="r2"),
            step(OURS, mib=100, s=1.0, device="Card B", driver=None, run="r2", round_=1),
        )
        assert line_of(text, "card")[1:] == ["Card A", "Card B"]
        assert line_of(text, "driver")[1:] == ["580.1", "590.2"]
        assert line_of(text, "2", OURS, "1024x1024")[4:6] == ["100.0 MiB", "-"]

    def test_other_versions_on_one_card_are_another_setup(self, tmp_path):
        later = step(OURS, mib=100, s=1.0, torch="2.13.0")
        text = reported(tmp_path, step(tables.HOST, mib=400, s=1.0), later)
        assert line_of(text, "this pack")[1:] == ["0.1.0 4ef9b7b"] * 2
        assert line_of(text, "torch")[1:] == ["2.11.0", "2.13.0"]
        assert line_of(text, "2", OURS)[4:6] == ["100.0 MiB", "-"]

    def test_a_rehearsal_says_so_first(self, tmp_path):
        folder = fill(tmp_path, [step(OURS, mib=1, s=1.0, rehearsal=True)])
        summary = report.write(folder)
        text = (folder / report.NAME).read_text(encoding="utf-8")
        assert text.splitlines()[2] == f"**{report.REHEARSAL}**"
        assert summary.splitlines()[0] == report.REHEARSAL
        assert all(f"- {what}\n" in text for what in catalogue.NOT_REHEARSED)
        assert "true sizes" not in text

    def test_no_measurement_at_all(self, tmp_path):
        assert report.write(tmp_path) == "Nothing was measured."
        left_out = ended("sanity", "dynamic VRAM", "left out", note="a card alone has it")
        text = reported(tmp_path, left_out)
        assert "- sanity (dynamic VRAM): a card alone has it\n" in text
        assert "- vae: not started\n" in text

    def test_every_part_has_a_section_and_a_leg_its_end(self, tmp_path):
        text = reported(tmp_path, *campaign())
        heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
        parts = [report.HEADS.get(part, part.capitalize()) for part in catalogue.PARTS]
        assert heads == ["How it ran", *parts, "Errors", "Without a result"]
        assert line_of(text, "training", "failed")[-1] == "9"
        assert "None" not in text

    @pytest.mark.parametrize("part", catalogue.PARTS)
    def test_every_column_names_a_field_of_the_parts(self, part):
        """One that names none would read "not measured" for ever."""
        mine = {"plot.py", "tables.py"}
        paths = (REPO / "benchmarks" / "card").rglob("*.py")
        sources = "".join(
            p.read_text(encoding="utf-8")
            for p in paths
            if p.name not in mine and not p.name.startswith("report")
        )
        named = {
            column.of
            for table in report.TABLES
            for column in (*table.keys, *table.columns)
            if table.part == part and isinstance(column.of, str) and column.of != "setup"
        }
        assert named
        assert [name for name in named if not re.search(rf"\b{name}\b", sources)] == []

    def test_the_summary_shows_both_and_who_survived(self, tmp_path):
        lines = report.write(fill(tmp_path, campaign())).splitlines()
        head = r"Card A, ComfyUI 0\.30\.0, torch 2\.11\.0 +ComfyUI +ours +ours / ComfyUI"
        assert re.fullmatch(head, lines[0])
        (denoiser,) = [one for one in lines if one.startswith("denoiser, dynamic VRAM, 1024x1024")]
        assert "480.0 MiB, 0.22 s" in denoiser
        assert denoiser.endswith("peak 0.19x, time 1.50x")
        (budget,) = [one for one in lines if one.startswith("budget, 4 GiB")]
        assert re.search(r"out of memory +3\.80 GiB, 11 s +peak -, time -$", budget)
        assert lines[-1] == "1 row with an error, see report.md, Errors"


class TestPlot:
    def test_is_a_picture_of_both_kinds(self, tmp_path):
        from matplotlib import image

        path = plot.draw(fill(tmp_path, campaign()))
        assert path == tmp_path / report.PLOT_NAME
        height, width, _ = image.imread(path).shape
        assert 600 <= height <= 1400
        assert 900 <= width <= 2600

    def test_shows_who_did_not_survive(self, tmp_path):
        found = campaign()
        tables.setups(found)
        runs = plot.panels(found)[0]
        host, ours, _ = runs.bars
        index = runs.pictures.index("1024x1024\non 4 GiB")
        assert (host.bytes[index], host.words[index]) == (None, "out of memory")
        assert ours.bytes[index] == int(3.8 * GIB)

    def test_steps_under_dynamic_vram_have_no_weights_in_them_and_are_left_out(self, tmp_path):
        found = [step(OURS, mib=1, s=1.0, allocated_bytes=GIB)]
        assert plot.draw(fill(tmp_path, found)) is None

    def test_says_why_there_is_none(self, tmp_path, caplog, monkeypatch):
        with caplog.at_level("INFO"):
            assert plot.draw(tmp_path) is None
        assert caplog.messages == ["No plot: no row has a card's peak."]
        caplog.clear()
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert plot.draw(fill(tmp_path, campaign())) is None
        assert caplog.messages == ["No plot: matplotlib is not installed."]

    def test_the_caption_names_the_card_the_versions_and_a_rehearsal(self):
        (setup,) = tables.setups([step(OURS, mib=1, s=1.0)])
        card = "Card A, 80.00 GiB, driver 580.1"
        versions = "ComfyUI 0.30.0, torch 2.11.0, comfy-aimdo 0.4.11, this pack 0.1.0 4ef9b7b"
        assert plot.caption(setup) == f"{card}\n{versions}, random weights"
        assert plot.caption({**setup, "rehearsal": True}).startswith(report.REHEARSAL)


def test_the_issue_form_is_valid():
    yaml = pytest.importorskip("yaml")
    path = REPO / ".github" / "ISSUE_TEMPLATE" / "card-report.yml"
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] in ENGLISH.nothing.replace("\n", " ")
    assert form["name"] in CHINESE.nothing
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"input", "textarea", "dropdown", "checkboxes"}
    ids = [field["id"] for field in fields]
    assert len(ids) == len(set(ids))
    assert {"card", "command", "report", "rows", "others", "consent"} <= set(ids)
    assert all(field["attributes"]["label"] for field in fields)
    for field in fields:
        options = field["attributes"].get("options", [])
        names = [option["label"] if isinstance(option, dict) else option for option in options]
        assert all(isinstance(name, str) for name in names)  # a bare Yes or No is a boolean
        assert len(names) == len(set(names))
