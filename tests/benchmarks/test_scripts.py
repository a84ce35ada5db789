"""Every script of benchmarks/ runs at its smallest size and prints its table.

Each runs in a process of its own, with the command line of `python run.py bench NAME`, and writes
its rows into a folder of the test. On Linux the libraries are imported already, see warm_python: a
script that forgets to import one of them runs all the same.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from os import environ
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pack.benchmarks import rows
from pack.runner import commands, environment
from pack.tests.benchmarks.warm_python import WarmPython

SCRIPTS = rows.REPO / "benchmarks"
RESULTS = SCRIPTS / "results"
MIB = 2**20
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]\d+)?")
# What keeps a script from running here, and why.
MISSING = {
    "host": "" if "ZIMAGE_HOST_DIR" in environ else "ZIMAGE_HOST_DIR is not set",
    "cuda": "" if torch.backends.cuda.is_built() else "needs torch with CUDA",
    "linux": "" if sys.platform == "linux" else "reads /proc",
}


class Case(NamedTuple):
    """One script at its smallest size; the first word of the case's name is the script's.

    args: its options.
    cells: what must be a finite number: the first cell of a row, and columns of that row.
    needs: keys of MISSING.
    """

    args: list[str]
    cells: list[tuple[str, tuple[str, ...]]]
    needs: tuple[str, ...] = ("host",)


VAE_ERRORS = ("live", "process", "time", "largest error", "equal 8-bit pixels", "most off")
PROBE = ("a step", "readings", "events", "of the step", "our limit")
ACCURACY = ("cases", "predicted / counted, lowest", "median", "highest")
COUNTED = ("launches", "moved", "peak", "to issue", "modelled, RTX 4060")
# The longest first.
CASES = {
    "load_ram": Case(
        # The other way is measured by tests/host/test_load_ram.py.
        ["--tiny", "--layers", "1", "--way", "mapped"],
        [("all shards mapped, then copied by ComfyUI",
          ("folder", "peak RAM", "of the folder", "time"))],
    ),
    "probe_overhead": Case(
        ["--heads", "2", "--side", "64", "--pairs", "1", "--steps", "1",
         "--details", "totals", "blocks, counter only", "blocks"],
        [("totals", PROBE), ("blocks, counter only", PROBE), ("blocks", (*PROBE, "watching"))],
    ),
    "plan_accuracy": Case(
        ["--cases", "1", "--stage", "text encode", "--stage", "denoise, stock",
         "--stage", "VAE, stock"],
        [("text encode", ACCURACY), ("denoise, stock", ACCURACY), ("VAE, stock", ACCURACY)],
        ("host", "cuda"),
    ),
    "block_time": Case(
        ["--pairs", "1", "--tokens", "32", "--variant", "balance (default)"],
        [("32", ("tokens", "ComfyUI", "`balance` (default)"))],
    ),
    "denoiser_peak": Case(
        ["--lean-layers", "1", "--case", "512x512x4", "--variant", "stock",
         "--variant", "balance (default)", "--variant", "balance, block level"],
        [
            ("512x512, batch 4", ("residual stream", "ComfyUI alone", "`balance` (default)",
                                  "`balance`, blocks alone, under ComfyUI's forward")),
            ("512x512, batch 4", ("ComfyUI's own estimate", "with Apply Gradient Checkpoint")),
        ],
    ),
    "added_peak": Case(
        ["--case", "512x512x4", "--added", "2 references"],
        [("512x512, batch 4", ("ComfyUI alone", "`balance` (default)"))],
        ("host", "cuda"),
    ),
    "families": Case(
        ["--family", "FLUX.1 dev", "--way", "ComfyUI alone", "--way", "balance (default)",
         "--weights", "plain", "--weights", "nvfp4"],
        [("FLUX.1 dev", ("residual stream", "ComfyUI alone", "`balance` (default)")),
         ("nvfp4", ("FLUX.1 dev, 2048x2048",))],
        ("host", "cuda"),
    ),
    "launches": Case(
        ["--part", "denoiser", "decode", "--side", "256", "--setting", "ComfyUI", "balance",
         "--pairs", "1"],
        [("256x256, ComfyUI", ("denoiser, setting", *COUNTED)),
         ("256x256, balance", ("denoiser, setting", *COUNTED)),
         ("256x256, balance", ("decode, setting", *COUNTED, "host waits",
                                "shapes of convolutions"))],
        ("host", "cuda"),
    ),
    "vae_compare": Case(
        ["--side", "64", "--way", "speed"],
        [("64x64, ComfyUI", VAE_ERRORS), ("64x64, Lean VAE `speed`", (*VAE_ERRORS, "PSNR"))],
        ("host", "linux"),
    ),
    "vae_compare wan": Case(
        ["--vae", "wan", "--side", "64", "--frames", "5", "--way", "speed"],
        [("64x64, 5 frames, ComfyUI", VAE_ERRORS),
         ("64x64, 5 frames, Lean VAE `speed`", (*VAE_ERRORS, "PSNR"))],
        ("host", "linux"),
    ),
    "vae_peak": Case(
        ["--case", "512x512x4", "--way", "encode", "--prefer", "stock", "--prefer", "speed"],
        [("encode 512x512, batch 4", ("ComfyUI alone", "`speed`"))],
        ("host", "cuda"),
    ),
    "training_memory": Case(
        ["--side", "256", "--layers", "1"],
        [
            ("no checkpointing", ("kept for backward", "peak")),
            ("Apply Gradient Checkpoint", ("kept for backward", "peak")),
        ],
    ),
    "diffusers_peak": Case(
        ["--case", "512x512x4"],
        [("512x512, batch 4", ("diffusers", "`enable_gradient_checkpointing()`",
                               '`set_attention_slice("max")`'))],
        ("cuda",),
    ),
    "fit_table": Case(
        [],
        [("8 GiB", ("1024x1024", "512x512, batch 4", "2048x2048", "4096x4096", "largest square",
                    "largest batch of 1024x1024"))],
        (),
    ),
    "vram_chart": Case(
        [],
        [("8 GiB", ("ComfyUI alone", "`prefer` balance", "smallest")),
         ("4096x4096", ("ComfyUI alone", "`prefer` balance", "smallest"))],
        (),
    ),
}  # fmt: skip


def _mib(name: str, digits: int) -> Callable[[list[dict[str, Any]]], list[str]]:
    """Every row's bytes of that name, as the script prints them."""
    return lambda kept: [f" {row[name] / MIB:.{digits}f} MiB" for row in kept if name in row]


def _launches(kept: list[dict[str, Any]]) -> list[str]:
    """Every counted run, without the points of the plots."""
    return [
        f"| {row['side_px']}x{row['side_px']}, {row['setting']} | {row['launches']:,} |"
        for row in kept
        if "line" not in row
    ]


def _cases_by_stage(kept: list[dict[str, Any]]) -> list[str]:
    stages = [row["stage"] for row in kept if "measured_bytes" in row]
    return [f"| {stage} | {stages.count(stage)} |" for stage in set(stages)]


# What --show prints of the committed rows.
SHOWN = {
    "added_peak": _mib("peak_bytes", 1),
    "denoiser_peak": _mib("peak_bytes", 1),
    "launches": _launches,
    "plan_accuracy": _cases_by_stage,
    "vae_compare": _mib("live_bytes", 0),
    "vae_peak": _mib("peak_bytes", 1),
}


def why_not(name: str) -> str:
    """What this machine lacks for a script; empty where it can run."""
    return ", ".join(filter(None, (MISSING[need] for need in CASES[name].needs)))


def contents(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob(pattern)) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def tables(printed: str) -> Iterator[list[dict[str, str]]]:
    """The rows of each Markdown table, by column; the first column also as ""."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", printed, re.M):
        head, line, *body = ([c.strip() for c in row[1:-1].split("|")] for row in block.split("\n")
                             if row)  # fmt: skip
        assert set("".join(line)) == {"-"}
        yield [{"": row[0], **dict(zip(head, row, strict=True))} for row in body]


def is_finite_number(cell: str) -> bool:
    return bool(NUMBER.search(cell)) and not re.search(r"\b(nan|inf)\b", cell)


class Runs:
    """Runs scripts in a warm Python.

    folder: for the rows of the smallest sizes, a folder for each script.
    before: the committed results, as they were.
    names: of the scripts that ran at their smallest size.
    """

    def __init__(self, python: WarmPython, folder: Path) -> None:
        self.folder, self.before, self._python = folder, contents(RESULTS), python
        self.names: set[str] = set()

    def run(self, name: str, args: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """Runs a script; its rows go to the folder."""
        return self._python.run(f"benchmarks.{name}", args, ZIMAGE_RESULTS_DIR=str(folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("results")
    settings = environment.child_environment(OMP_NUM_THREADS="1", PYTHONUTF8="1")
    with WarmPython(rows.REPO, tmp_path_factory.mktemp("printed"), settings) as python:
        yield Runs(python, folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_script_prints_its_table_at_its_smallest_size(name: str, runs: Runs):
    if reason := why_not(name):
        pytest.skip(reason)
    runs.names.add(name)
    script = name.split()[0]
    done = runs.run(script, CASES[name].args, runs.folder / name)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = list(tables(done.stdout))
    for first, columns in CASES[name].cells:
        found = [r for t in printed for r in t if r[""] == first and set(columns) <= set(r)]
        assert found, f"no row {first!r} with {columns} in:\n{done.stdout}"
        assert {c: found[0][c] for c in columns if not is_finite_number(found[0][c])} == {}
    assert rows.read(runs.folder / name / f"{script}.jsonl")


@pytest.mark.slow
def test_no_script_has_written_into_the_committed_results(runs: Runs):
    if not runs.names:
        pytest.skip("no script ran")
    after = contents(RESULTS)
    assert {name for name in after if after[name] != runs.before.get(name)} == set()
    assert after.keys() == runs.before.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_show_prints_the_committed_rows_and_changes_none(name: str, runs: Runs, tmp_path: Path):
    if reason := why_not(name):
        pytest.skip(reason)
    folder = shutil.copytree(RESULTS, tmp_path / "results")
    done = runs.run(name, ["--show"], folder)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = SHOWN[name]([json.loads(line) for line in (RESULTS / f"{name}.jsonl").open()])
    assert wanted
    assert [text for text in wanted if text not in done.stdout] == []
    assert contents(folder, "*.jsonl") == contents(RESULTS, "*.jsonl")


def test_every_script_has_a_case_here():
    scripts = {path for path in SCRIPTS.glob("*.py") if path.name not in commands.NO_BENCHMARKS}
    assert {path.stem for path in scripts} == {name.split()[0] for name in CASES}
    shows = {path.stem for path in scripts if '"--show"' in path.read_text("utf-8")}
    assert shows == set(SHOWN)


def test_a_row_that_was_not_measured_is_no_number():
    (table,) = tables("text\n| case | peak |\n|---|---|\n| a | 1.5 MiB |\n| b | nan MiB |\n")
    assert [row["peak"] for row in table] == ["1.5 MiB", "nan MiB"]
    assert [is_finite_number(row["peak"]) for row in table] == [True, False]
    assert not any(map(is_finite_number, ("not measured", "-", "inf", "inf %", "1 of nan")))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--frames", "5"], "--frames: Flux's VAE makes pictures"),
        (["--vae", "wan", "--maps"], "--maps: kept of Flux's VAE alone"),
    ],
)
def test_what_vae_compare_does_not_measure_is_refused(
    args: list[str], reason: str, runs: Runs, tmp_path: Path
):
    done = runs.run("vae_compare", args, tmp_path)
    assert done.returncode == 2
    assert reason in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["denoiser_peak", "vae_peak"])
def test_a_case_that_a_script_does_not_have_is_refused(name: str, runs: Runs, tmp_path: Path):
    done = runs.run(name, ["--case", "1x1x1"], tmp_path)
    assert done.returncode == 2
    assert "--case: invalid choice: '1x1x1'" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
