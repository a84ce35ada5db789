"""`run.py plan --json` and `--chart`: what they hold, and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from pack.nodes.units import size
from pack.runner import bars
from pack.tests.architecture_rules import REPO


def plan(*options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-S", str(REPO / "run.py"), "plan", *map(str, options)]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)


def read(*options: Any, rc: int = 0) -> dict[str, Any]:
    made = plan("--json", *options)
    assert made.returncode == rc, made.stderr
    return json.loads(made.stdout)


def words(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_text("utf-8"))
    return [each.text or "" for each in root.iter() if each.tag.rpartition("}")[2] == "text"]


class TestJson:
    def test_has_the_figures_of_the_words(self):
        options = ("--width=2048", "--height=2048", "--vram=6", "--copy-gbs=12")
        told, found = plan(*options).stdout, read(*options)
        assert (found["width_px"], found["height_px"], found["batch"]) == (2048, 2048, 1)
        assert found["budget_bytes"] == 6 * 2**30
        assert found["verdict"] == "fits" and found["missing_bytes"] == 0
        assert [s["name"] for s in found["stages"]] == ["text encode", "denoise", "VAE decode"]
        for stage in found["stages"]:
            for key in ("model_weight_bytes", "activation_bytes", "workspace_bytes", "peak_bytes"):
                assert size(stage[key]) in told
            assert stage["setting"] in told
            assert stage["peak_bytes"] <= found["budget_bytes"]
        denoise = found["stages"][1]
        assert found["streamed_bytes_per_step"] == denoise["streamed_weight_bytes"] > 0
        assert found["copy_bytes_per_s"] == 12e9 and not found["copy_speed_is_assumed"]
        # What is used, as `--family` says it, not the 0 for "chooses" that was asked.
        used = found["denoiser"]
        assert used["prefer"] == "balance" and used["head_groups"] >= 1
        tokens = 128 * 128 + 256
        for key in ("chunk_tokens", "feed_forward_chunk_tokens"):
            assert 1024 <= used[key] <= tokens
        assert found["alternatives"] == []
        assert all(note in told for note in found["notes"])

    def test_says_what_comfyui_alone_takes(self):
        found = read("--width=2560", "--height=2560")
        alone = found["comfyui_alone"]
        assert alone["verdict"] == "too large" and alone["missing_bytes"] > 0
        ours, stock = ({s["name"]: s for s in of["stages"]} for of in (found, alone))
        assert stock["VAE decode"]["peak_bytes"] > 3 * ours["VAE decode"]["peak_bytes"]
        assert {s["setting"] for s in stock.values()} == {"ComfyUI's own"}

    def test_a_plan_that_does_not_fit_says_what_would(self):
        found = read("--width=8192", "--height=8192", "--batch=2", "--vram=2", rc=1)
        assert found["verdict"] == "too large" and found["missing_bytes"] > 0
        (other,) = found["alternatives"]
        assert other["differs_in"] == "size" and 0 < other["width_px"] < 8192
        assert other["batch"] == 2

    def test_of_another_family(self):
        options = ("--family", "wan", "--width=1280", "--height=720", "--frames=81")
        told, found = plan(*options).stdout, read(*options)
        assert found["family"] == "Wan 2.1 14B"
        ways = {way["prefer"]: way for way in found["ways"]}
        assert list(ways) == [None, "speed", "balance", "smallest"]
        assert all(size(way["activation_peak_bytes"]) in told for way in ways.values())
        assert ways[None]["head_groups"] is None and ways["smallest"]["head_groups"] > 1


class TestChart:
    def test_draws_both_beside_each_other_within_the_budget(self, tmp_path: Path):
        path = tmp_path / "plan.svg"
        made = plan("--width=2560", "--height=2560", "--chart", path)
        assert made.returncode == 0, made.stderr
        assert made.stdout.rstrip().endswith(f"Chart: {path}")
        found = words(path)
        assert found[0].startswith("2560x2560 fits in 8 GiB; ComfyUI alone is ")
        assert found[0].endswith(" GiB short")
        assert found.count("ComfyUI alone") == found.count("with this pack") == 3
        assert "with this pack: Lean VAE balance" in found and "8 GiB free" in found
        assert "@media(prefers-color-scheme:dark)" in path.read_text("utf-8")

    @pytest.mark.parametrize(
        ("options", "title"),
        [
            (["--vram=8"], "1024x1024 fits in 8 GiB, with ComfyUI alone too"),
            # Three digits made 10.8 and 1.5e+03 of these.
            (["--vram=10.75"], "1024x1024 fits in 10.75 GiB, with ComfyUI alone too"),
            (["--vram=0.004"], "1024x1024 does not fit in 4.1 MiB: "),
            (["--vram=1500"], "1024x1024 fits in 1500 GiB, with ComfyUI alone too"),
            (["--width=4096", "--height=4096", "--vram=1.5"], "4096x4096 is tight in 1.5 GiB: "),
            (["--width=8192", "--height=8192", "--batch=2", "--vram=2"],
             "8192x8192, batch 2, does not fit in 2 GiB: "),
        ],
    )  # fmt: skip
    def test_the_title_is_the_verdict(self, tmp_path: Path, options, title):
        path = tmp_path / "plan.svg"
        made = plan(*options, "--chart", path)
        assert made.returncode == ("does not fit" in title)
        assert words(path)[0].startswith(title)

    def test_beside_json_nothing_else_is_printed(self, tmp_path: Path):
        path = tmp_path / "plan.svg"
        found = read("--chart", path)
        shown = {stage["name"] for stage in found["stages"]}
        assert shown <= set(words(path))

    def test_of_another_family(self, tmp_path: Path):
        path = tmp_path / "wan.SVG"
        assert plan("--family=sdxl", "--batch=2", "--chart", path).returncode == 0
        assert {"ComfyUI alone", "speed", "balance", "smallest"} <= set(words(path))

    def test_a_file_that_cannot_be_written_is_one_sentence(self, tmp_path: Path):
        for name, told in (
            (tmp_path / "missing" / "x.svg", f"there is no folder {tmp_path / 'missing'}"),
            (tmp_path / "x.png", "must end in .svg, got "),
        ):
            made = plan("--chart", name)
            assert (made.returncode, made.stdout) == (2, "")
            assert told in made.stderr.splitlines()[-1]
        (tmp_path / "folder.svg").mkdir()
        made = plan("--chart", tmp_path / "folder.svg")
        assert (made.returncode, made.stdout) == (1, "")
        assert len(made.stderr.splitlines()) == 1 and "folder.svg" in made.stderr


def test_marks_are_round_and_reach_the_end():
    assert bars.marks(12 * 2**30) == [
        (0, "0"), (5 * 2**30, "5 GiB"), (10 * 2**30, "10 GiB")
    ]  # fmt: skip
    assert [name for _, name in bars.marks(0.9 * 2**30)][-1] == "800 MiB"


@pytest.mark.parametrize("gib", [3, 30, 10**9])
def test_the_axis_has_its_last_mark(gib):
    """It once came from a difference of pixels, which is 0 for so many bytes."""
    bar = bars.Bar("a", {"weights": 2**30}, "1 GiB")
    chart = bars.Bars("t", "s", (bars.Group("g", "w", (bar,)),), (), gib * 2**30)
    marks = [
        (each.text, float(each.get("x", 0)))
        for each in ElementTree.fromstring(chart.svg()).iter()
        if each.get("text-anchor") == "middle"
    ]
    assert [name for name, _ in marks] == [name for _, name in bars.marks(gib * 2**30)]
    assert marks[-1] == (f"{gib:g} GiB", bars.RIGHT)


def test_a_bar_is_as_long_as_its_bytes():
    bar = bars.Bar("a", {"weights": 3 * 2**30, "workspace": 2**30}, "4 GiB")
    chart = bars.Bars("t", "s", (bars.Group("g", "w", (bar,)),), (), 8 * 2**30, "8 GiB free")
    found = ElementTree.fromstring(chart.svg("light"))
    widths = {
        each.get("class"): float(each.get("width", 0))
        for each in found.iter()
        if each.get("height") == f"{bars.BAR_PX}"
    }
    assert list(widths) == ["fill-weights", "fill-other"]
    assert widths["fill-weights"] == pytest.approx((bars.RIGHT - bars.LEFT) * 3 / 8)
