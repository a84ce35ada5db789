"""The whole campaign on the CPU, as a user starts it: every part to its end, every field there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pack.benchmarks.card import catalogue, report, rows
from pack.benchmarks.card.campaign import ENDED, LEFT_OUT, LEG_CASE

REPO = Path(catalogue.__file__).resolve().parents[2]
FACTS = {
    "part", "leg", "run", "rehearsal", "pack", "weights", "card_gib", "device", "card_bytes",
    "driver", "allocator", "torch", "system", "mode", "attention", "dtype", "comfyui",
    "comfy_aimdo", "comfy_kitchen", "case", "variant", "round", "error",
}  # fmt: skip
BYTES = {"peak_bytes", "reserved_bytes", "allocated_bytes", "weights_bytes"}
# Seconds of a run's stages; one that the host took from its cache took none.
STAGES = {"load_s", "text_s", "plan_s", "sampling_s", "decode_s", "save_s"}
# What the rows of a part say, by a pattern of their case: every row all of it, None included.
FIELDS = {
    "sanity": {
        r".*": {
            "is_bit_equal", "relative_error", "largest_error", "host_relative_error", "reference",
            "seconds", "note",
        },
    },
    "vae": {
        r"[\dx]+ (decode|encode)": {
            "first_s", "seconds", "largest_error", "equal_8bit", "most_off_8bit", "psnr_db",
            "seam_energy", "workspace_bytes", *BYTES,
        },
        r"[\dx]+ decode launches": {"kernels", "copies", "operations"},
    },
    "budget": {
        r"[\dx]+( with VRAM Probes)?": {
            "survived", "peak_bytes", "ballast_bytes", "free_bytes", "seconds", *STAGES,
            "ram_peak_bytes", "is_equal", "equal_8bit", "most_off_8bit", "psnr_db", "loader",
            "plan", "planned_bytes", "probe_peak_bytes", "note",
        },
    },
    "training": {
        r"[\dx]+": {"step_s", "seconds", "loss", "loss_relative_difference", "steps", *BYTES},
    },
    "denoiser": {
        r"[\dx]+( fp8| scaled fp8| int8| LoRA)?": {
            "step_s", "cpu_step_s", "steps", "workspace_bytes", *BYTES,
        },
        r"[\dx]+ launches": {"kernels", "copies", "operations"},
    },
    "predicted": {
        r"text encode, .*|[\dx]+ (denoise|decode|encode)": {
            "predicted_bytes", "measured_bytes", "ratio",
        },
        r"[\dx]+ narrow model": {"step_s", "kernels", "operations"},
        r"constants": {"value", "low", "high", "today", "samples"},
    },
    "probe": {
        r"[\dx]+": {
            "probe_peak_bytes", "parts_sum_bytes", "outside_peak_bytes", "ratio",
            "driver_peak_bytes", "note", "step_s", "plain_step_s", "cost", "is_bit_equal",
        },
    },
    "tutorial": {
        r"[\dx]+": {
            "peak_bytes", "activation_peak_bytes", "weight_bytes", "reserved_bytes", "seconds",
            "steps",
        },
    },
}  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("ZIMAGE_HOST_DIR"),
        reason="needs a host: set ZIMAGE_HOST_DIR to an unpacked ComfyUI",
    ),
]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a rehearsal, and what it printed."""
    folder = tmp_path_factory.mktemp("card")
    told = rehearse(folder)
    assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-4000:]
    return folder, told.stdout


def rehearse(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.card", "--rehearse", "--out", str(folder)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


@pytest.fixture(scope="module")
def found(rehearsed) -> list[rows.Row]:
    return rows.read(rehearsed[0] / "rows.jsonl")


def measured(found: list[rows.Row], part: str) -> list[rows.Row]:
    return [row for row in found if row["part"] == part and row["case"] != LEG_CASE]


def test_every_leg_came_to_its_end_or_says_why_it_needs_a_card(found):
    ends = {(r["part"], r["leg"]): (r["variant"], r.get("note")) for r in found
            if r["case"] == LEG_CASE}  # fmt: skip
    wanted = {
        (leg.part, leg.name): (LEFT_OUT, leg.needs_card) if leg.needs_card else (ENDED, None)
        for leg in catalogue.legs()
    }
    assert ends == wanted


def test_no_row_has_an_error(found):
    assert [(r["part"], r["case"], r["variant"], r["error"]) for r in found if r["error"]] == []


@pytest.mark.parametrize("part", catalogue.PARTS)
def test_every_row_says_where_and_with_which_versions_it_was_measured(found, part):
    kept = measured(found, part)
    assert kept
    for row in kept:
        assert row.keys() >= FACTS, FACTS - row.keys()
        assert row["rehearsal"] is True and row["device"].startswith("cpu")
        for name in ("torch", "comfyui", "dtype", "attention", "mode"):
            assert row[name], name


@pytest.mark.parametrize("part", FIELDS)
def test_every_row_has_its_fields(found, part):
    patterns = FIELDS[part]
    seen = set()
    for row in measured(found, part):
        if row["variant"] == "loading":
            continue
        pattern = next((p for p in patterns if re.fullmatch(p, row["case"])), None)
        assert pattern is not None, row["case"]
        assert row.keys() >= patterns[pattern], (row["case"], patterns[pattern] - row.keys())
        seen.add(pattern)
    assert seen == set(patterns)


def test_no_figure_that_only_a_card_gives_is_invented(found):
    for row in found:
        for name in (*BYTES, "workspace_bytes", "kernels", "driver_peak_bytes", "measured_bytes"):
            assert row.get(name) is None, (row["part"], row["case"], name)


def test_every_time_is_a_positive_number(found):
    times = [(r["part"], n, v) for r in found for n, v in r.items()
             if (n.endswith("_s") or n == "seconds") and v is not None]  # fmt: skip
    assert len(times) > 50
    assert [time for time in times if not time[2] > 0 and time[1] not in STAGES] == []
    assert [time for time in times if time[2] < 0] == []


def test_the_report_is_made_and_says_that_it_is_a_rehearsal(rehearsed):
    folder, told = rehearsed
    text = (folder / "report.md").read_text()
    assert report.REHEARSAL in text and report.REHEARSAL in told
    for part in catalogue.PARTS:
        assert f"\n## {part}\n" in text.lower()
    for reason in catalogue.NOT_REHEARSED:
        assert reason in text and reason in told


def test_rows_and_report_name_no_path_and_no_prompt(rehearsed):
    from pack.benchmarks.card.parts.predicted import PROMPT
    from pack.runner.graphs import PROMPT as DEMO_PROMPT

    folder, _ = rehearsed
    for name in ("rows.jsonl", "report.md"):
        text = (folder / name).read_text()
        for secret in (str(folder), str(REPO), os.environ["ZIMAGE_HOST_DIR"], sys.prefix):
            assert secret not in text
        for prompt in (PROMPT, DEMO_PROMPT):
            assert prompt[:20] not in text


def test_a_second_start_has_nothing_left_to_do(rehearsed):
    folder, _ = rehearsed
    before = (folder / "rows.jsonl").read_bytes()
    again = rehearse(folder)
    assert again.returncode == 0, again.stderr
    assert (folder / "rows.jsonl").read_bytes() == before


def test_the_host_alone_stands_beside_every_way_of_ours(found):
    for part in ("denoiser", "vae", "budget", "tutorial"):
        kept = measured(found, part)
        for row in kept:
            if row["variant"] == "loading" or "launches" in row["case"]:
                continue
            partners = [r for r in kept if r["case"] == row["case"] and r["round"] == row["round"]]
            assert "ComfyUI" in {r["variant"] for r in partners}, json.dumps(row)
