"""The report, the plot and the READMEs' table of a campaign on a card, from invented rows."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pack.benchmarks.card import catalogue, plot, readme_table, report, tables
from pack.benchmarks.card.readme_words import CHINESE, ENGLISH
from pack.tests.architecture_rules import REPO

GIB, MIB = 2**30, 2**20
FACTS = {
    "run": "r1", "rehearsal": False, "weights": "random", "card_gib": None, "device": "Card A",
    "card_bytes": 80 * GIB, "driver": "580.1", "allocator": "cudaMallocAsync", "torch": "2.11.0",
    "system": "Linux", "mode": "dynamic VRAM", "attention": "attention_pytorch",
    "dtype": "bfloat16", "comfyui": "0.30.0", "comfy_aimdo": "0.4.11", "comfy_kitchen": "0.2.26",
    "pack": "0.1.0 4ef9b7b",
}  # fmt: skip
OURS, FIT = report.DENOISER_OURS, report.BUDGET_OURS
Row = dict[str, Any]


def row(part: str, case: str, variant: str, round_: int = 0, **figures: Any) -> Row:
    named = {"part": part, "leg": "dynamic VRAM", "case": case, "variant": variant}
    return {**FACTS, **named, "round": round_, "error": None, **figures}


def step(variant: str, round_: int = 0, *, mib: float, s: float, **more: Any) -> Row:
    figures = {"peak_bytes": int(mib * MIB), "step_s": s, **more}
    return row("denoiser", figures.pop("case", "1024x1024x1"), variant, round_, **figures)


def whole(variant: str, round_: int = 1, *, gib: float | None, s: float | None, **more: Any) -> Row:
    card_gib = more.get("card_gib")
    figures = {
        "leg": "the card as it is" if card_gib is None else f"{card_gib:g} GiB",
        "peak_bytes": None if gib is None else int(gib * GIB), "seconds": s, "survived": True,
        **more,
    }  # fmt: skip
    return row("budget", figures.pop("case", "1024x1024x1"), variant, round_, **figures)


def ended(part: str, leg: str, how: str, **figures: Any) -> Row:
    """The campaign's own row of a leg; it knows no device."""
    named = {"part": part, "leg": leg, "run": "r1", "rehearsal": False, "case": "leg"}
    return {**named, "variant": how, "round": 0, "error": None, **figures}


def fill(folder: Path, found: Iterable[Row], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in found))
    return folder


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


def campaign() -> list[Row]:
    """Rows of every part, with an error, an imitated card that ComfyUI does not survive, a cut."""
    sizes = {"512x512x1": 0.5, "1024x1024x1": 1.0, "2048x2048x1": 4.0}
    found = [
        row("sanity", "node", OURS, is_bit_equal=True, relative_error=1e-3,
            host_relative_error=1e-3, largest_error=2e-3, reference="float64", seconds=0.2),
        row("sanity", "start", "allocator", counted_bytes=255 * MIB, expected_bytes=256 * MIB),
    ]  # fmt: skip
    for case, scale in sizes.items():
        for index in range(3):
            drift = 1 + 0.1 * index
            found.append(
                step(tables.HOST, index, mib=480 * scale, s=0.2 * drift * scale, case=case)
            )
            found.append(step(OURS, index, mib=90 * scale, s=0.3 * drift * scale, case=case))
        for name, weights in ((tables.HOST, 12.3), (OURS, 11.9)):
            held = int((weights + scale) * GIB)
            estimate = {"leg": "loading by estimate", "mode": "loading by estimate", "case": case}
            found.append(step(name, mib=480, s=0.2, allocated_bytes=held, **estimate))
        for name, extra in ((tables.HOST, 4.0), (FIT, 1.0), (f"{FIT} smallest", 0.6)):
            found += [
                whole(name, index, gib=13 + extra * scale, s=9.0 - index, case=case,
                      is_equal=name == tables.HOST, equal_8bit=0.997, most_off_8bit=2)
                for index in (0, 1)
            ]  # fmt: skip
    found += [
        whole(FIT, gib=99.0, s=99.0, case="1024x1024x1 with VRAM Probes"),
        step(tables.HOST, mib=99, s=9.0, case="1024x1024x1 fp8"),
        whole(tables.HOST, 0, gib=None, s=None, card_gib=4.0, survived=False,
              error="out of memory"),
        whole(FIT, 0, gib=3.7, s=14.0, card_gib=4.0),
        whole(FIT, 1, gib=3.8, s=11.0, card_gib=4.0),
        row("denoiser", "1024x1024x1 launches", tables.HOST, kernels=750, copies=3),
        row("denoiser", "1024x1024x1 launches", OURS, kernels=16620, copies=9),
        row("vae", "decode 1024x1024x1", tables.HOST, peak_bytes=1296 * MIB, seconds=0.1),
        row("vae", "decode 1024x1024x1", "Lean VAE speed", peak_bytes=603 * MIB, seconds=0.09,
            largest_error=1e-3, equal_8bit=0.99, most_off_8bit=1, psnr_db=70.0, seam_energy=1.01),
        row("predicted", "denoise 1024x1024x1", OURS, predicted_bytes=90 * MIB,
            measured_bytes=91 * MIB, ratio=90 / 91),
        row("predicted", "256x256x1 narrow model", OURS, step_s=0.1, kernels=6344),
        row("predicted", "constants", "A_NEW_ONE", value=1.0, samples=1),
        row("predicted", "constants", "DENOISER_RESERVED", value=1.4, low=1.2, high=1.6,
            today=1.7, samples=12),
        row("probe", "1024x1024x1", "steps", probe_peak_bytes=12 * GIB, ratio=1.01, cost=0.004),
        row("tutorial", "1024x1024x1", tables.HOST, peak_bytes=24 * GIB, seconds=5.0),
        row("training", "512x512x1", "ComfyUI, depth 1", peak_bytes=20 * GIB, step_s=3.0),
        row("training", "512x512x1", "ComfyUI, depth 2", peak_bytes=10 * GIB, step_s=3.0),
        row("training", "512x512x1", OURS, peak_bytes=10 * GIB, step_s=2.7, seconds=5.0, loss=0.5),
        ended("denoiser", "dynamic VRAM", "ended", seconds=200.0),
        ended("training", "all", "failed", seconds=9.0, error="RuntimeError: no"),
    ]  # fmt: skip
    return found


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
        mine = {"plot.py", "readme_table.py", "tables.py"}
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


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """Both READMEs, and no rows."""
    for name in readme_table.READMES:
        shutil.copy(REPO / name, tmp_path / name)
    (tmp_path / readme_table.CARDS).mkdir(parents=True)
    return tmp_path


def body_of(repo: Path, name: str = "README.md") -> str:
    text = (repo / name).read_text(encoding="utf-8")
    return text.partition(readme_table.BEGIN)[2].partition(readme_table.END)[0].strip("\n")


class TestReadmeTable:
    def test_the_repository_is_up_to_date(self, capsys):
        assert readme_table.main(["--check"]) == 0, capsys.readouterr().out

    def test_without_rows_one_sentence_says_how_to_make_one(self, repo):
        (repo / readme_table.CARDS).rmdir()
        assert readme_table.main([], repo) == 0
        assert body_of(repo) == ENGLISH.nothing
        assert body_of(repo, "README.zh.md") == CHINESE.nothing
        assert "python run.py bench card" in ENGLISH.nothing

    def test_makes_lines_of_warm_runs_and_else_of_steps(self, repo):
        found = [*campaign(), step(tables.HOST, mib=1900, s=1.0, case="2048x2048x2")]
        fill(repo / readme_table.CARDS, found, "a.jsonl")
        assert readme_table.main(["--check"], repo) == 1
        assert readme_table.main([], repo) == 0
        lines = [
            [cell.strip() for cell in line.strip("|").split(" | ")]
            for line in body_of(repo).splitlines()
            if line.startswith("|")
        ]
        versions = "pack 0.1.0 4ef9b7b, ComfyUI 0.30.0, torch 2.11.0, driver 580.1, random weights"
        close = "99.70 % of 8-bit values equal, largest difference 2"
        assert [tuple(line) for line in lines[2:]] == [
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
        fill(repo / readme_table.CARDS, [whole(FIT, **given_up)], "a.jsonl")
        assert readme_table.main([], repo) == 0
        assert "| not measured | not measured | not measured |" in body_of(repo)

    def test_is_the_same_the_second_time_and_in_any_order_of_rows(self, repo):
        fill(repo / readme_table.CARDS, campaign(), "a.jsonl")
        assert readme_table.main([], repo) == 0
        made = {name: (repo / name).read_bytes() for name in readme_table.READMES}
        fill(repo / readme_table.CARDS, reversed(campaign()), "a.jsonl")
        assert readme_table.main([], repo) == 0
        assert readme_table.main(["--check"], repo) == 0
        assert {name: (repo / name).read_bytes() for name in made} == made

    def test_the_chinese_one_is_chinese(self, repo):
        fill(repo / readme_table.CARDS, campaign(), "a.jsonl")
        readme_table.main([], repo)
        body = body_of(repo, "README.zh.md")
        assert "| 显存不足 |" in body
        assert all(word not in body for word in ("out of memory", "not measured", "random"))

    def test_refuses_rows_of_a_rehearsal(self, repo, capsys):
        before = body_of(repo)
        fill(repo / readme_table.CARDS, [step(OURS, mib=1, s=1.0, rehearsal=True)], "b.jsonl")
        assert readme_table.main([], repo) == 1
        told = capsys.readouterr().err
        assert told == "readme_table: b.jsonl holds rows of a rehearsal, which measured no card\n"
        assert body_of(repo) == before

    @pytest.mark.parametrize(
        "text",
        ["no markers", readme_table.BEGIN, f"{readme_table.END}\n{readme_table.BEGIN}\n",
         f"{readme_table.BEGIN}\n{readme_table.END}\n" * 2],
    )  # fmt: skip
    def test_says_which_readme_lacks_its_markers(self, repo, capsys, text):
        (repo / "README.zh.md").write_text(text, encoding="utf-8")
        assert readme_table.main([], repo) == 1
        told = capsys.readouterr().err
        begin, end = readme_table.BEGIN, readme_table.END
        lines = f"must have the lines {begin} and {end} once, in this order"
        assert told == f"readme_table: README.zh.md {lines}\n"


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
