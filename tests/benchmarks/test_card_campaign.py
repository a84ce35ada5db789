"""The campaign's processes: one part's end never takes another part's rows with it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pack.benchmarks.card import campaign, catalogue, rows
from pack.benchmarks.card.job import Job, Leg, Picture, from_json, picture

REPO = Path(campaign.__file__).resolve().parents[2]
FAKES = "tests.benchmarks.card_fakes"
BACK = chr(92)
posix_only = pytest.mark.skipif(os.name == "nt", reason="signals and process groups")


def leg(name: str, **options) -> Leg:
    return Leg("fake", name, module=FAKES, **{"limit_s": 60.0, **options})


def settings(folder: Path, **options) -> campaign.Campaign:
    return campaign.Campaign(folder, REPO, is_rehearsal=True, **options)


def found(folder: Path, name: str) -> list[tuple[str, str, str | None]]:
    """Case, variant and error of a leg's rows."""
    kept = [row for row in rows.read(folder / "rows.jsonl") if row["leg"] == name]
    return [(row["case"], row["variant"], row["error"]) for row in kept]


class TestOneEndsTheOthersGoOn:
    def test_a_part_that_raises(self, tmp_path):
        legs = [leg("raises"), leg("works")]
        assert not campaign.run(settings(tmp_path), legs)
        error = "ValueError: inside.py is broken"
        assert found(tmp_path, "raises") == [
            ("64x64x1", "before", None),
            ("fake", "error", error),
            ("leg", "failed", error),
        ]
        assert found(tmp_path, "works")[-1] == ("leg", "ended", None)
        assert len(found(tmp_path, "works")) == 3

    def test_a_variant_that_raises_leaves_the_part_running(self, tmp_path):
        assert not campaign.run(settings(tmp_path), [leg("variant raises")])
        assert found(tmp_path, "variant raises")[1:] == [
            ("64x64x1", "bad", "ValueError: it cannot be"),
            ("64x64x1", "after", None),
            ("leg", "failed", "ValueError: it cannot be"),
        ]
        row = rows.read(tmp_path / "rows.jsonl")[1]
        assert (row["kept"], row["note"]) == (1, "a node says so; the host warns; its own")

    def test_running_out_of_memory_is_a_result(self, tmp_path):
        assert campaign.run(settings(tmp_path), [leg("runs out")])
        assert found(tmp_path, "runs out")[1:] == [
            ("64x64x1", "bad", rows.OUT_OF_MEMORY),
            ("64x64x1", "after", None),
            ("leg", "ended", None),
        ]

    @posix_only
    def test_a_part_that_is_killed(self, tmp_path):
        assert not campaign.run(settings(tmp_path), [leg("dies"), leg("works")])
        assert found(tmp_path, "dies")[0] == ("64x64x1", "before", None)
        assert found(tmp_path, "dies")[1][2].startswith("ended with signal 9")
        assert found(tmp_path, "works")[-1] == ("leg", "ended", None)

    @posix_only
    @pytest.mark.slow
    def test_a_part_that_hangs_is_ended_with_all_that_it_started(self, tmp_path):
        assert not campaign.run(settings(tmp_path), [leg("hangs", limit_s=3.0), leg("works")])
        assert found(tmp_path, "hangs")[-1] == ("leg", "failed", "ended after its limit of 3 s")
        assert found(tmp_path, "works")[-1] == ("leg", "ended", None)
        assert str(tmp_path) not in running()


def running() -> str:
    """The command lines of all processes but the test's own."""
    lines = []
    for place in Path("/proc").glob("[0-9]*"):
        if int(place.name) != os.getpid():
            try:
                lines.append((place / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return "\n".join(lines)


class TestGoingOn:
    def test_what_ended_is_not_run_again_and_what_failed_comes_last(self, tmp_path):
        legs = [leg("is resumed"), leg("works")]
        assert not campaign.run(settings(tmp_path), legs)
        assert [each.name for each in campaign.left_to_do(tmp_path, legs)] == ["is resumed"]
        before = found(tmp_path, "works")
        more = [*legs, leg("other")]
        assert [each.name for each in campaign.left_to_do(tmp_path, more)] == [
            "other",
            "is resumed",
        ]
        assert campaign.run(settings(tmp_path), legs)
        assert found(tmp_path, "works") == before
        assert found(tmp_path, "is resumed")[-1] == ("leg", "ended", None)
        assert campaign.left_to_do(tmp_path, legs) == []

    def test_a_leg_that_reads_others_runs_again_when_they_have_new_rows(self, tmp_path):
        reads = Leg("reader", module=FAKES, limit_s=60.0, reads=("fake",))
        assert campaign.run(settings(tmp_path), [reads])
        assert campaign.left_to_do(tmp_path, [reads]) == []
        assert campaign.run(settings(tmp_path), [leg("works"), reads])
        assert found(tmp_path, "all").count(("leg", "ended", None)) == 1
        assert campaign.left_to_do(tmp_path, [leg("works"), reads]) == [reads]
        assert campaign.run(settings(tmp_path), [leg("works"), reads])
        assert found(tmp_path, "all").count(("leg", "ended", None)) == 2
        assert campaign.left_to_do(tmp_path, [leg("works"), reads]) == []

    def test_a_card_imitates_no_larger_one(self, monkeypatch):
        large, small = leg("large", card_gib=8.0), leg("small", card_gib=6.0)
        monkeypatch.setattr(campaign.driver, "total_bytes", lambda: int(7.99 * 2**30))
        assert "8.0 GiB: it cannot imitate" in campaign.left_out(large, is_rehearsal=False)
        assert campaign.left_out(small, is_rehearsal=False) == ""
        monkeypatch.setattr(campaign.driver, "total_bytes", lambda: None)
        assert campaign.left_out(large, is_rehearsal=False) == ""

    def test_without_time_nothing_is_started(self, tmp_path):
        assert not campaign.run(settings(tmp_path, minutes=0.1), [leg("works")])
        assert not (tmp_path / "rows.jsonl").exists()

    def test_a_leg_that_needs_more_time_than_is_left_gives_way_to_shorter_ones(self, tmp_path):
        legs = [leg("works"), leg("long", seconds=3600.0), leg("runs out", seconds=1.0)]
        assert not campaign.run(settings(tmp_path), legs)
        assert [each.name for each in campaign.left_to_do(tmp_path, legs)] == ["long"]
        assert campaign.run(settings(tmp_path), legs)  # nothing else is left: it is started

    @pytest.mark.slow
    def test_a_leg_cut_by_the_time_is_tried_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(campaign, "LEAST_SECONDS", 1.0)
        assert not campaign.run(settings(tmp_path, minutes=3 / 60), [leg("hangs")])
        assert found(tmp_path, "hangs")[-1][:2] == ("leg", "out of time")
        assert len(campaign.left_to_do(tmp_path, [leg("hangs")])) == 1

    def test_what_needs_a_card_is_left_out_of_a_rehearsal_with_its_reason(self, tmp_path):
        assert campaign.run(settings(tmp_path), [leg("works", needs_card="it needs one")])
        [row] = rows.read(tmp_path / "rows.jsonl")
        assert (row["variant"], row["note"]) == ("left out", "it needs one")

    @posix_only
    @pytest.mark.slow
    @pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_a_killed_campaign_keeps_its_rows_and_leaves_nothing_running(self, tmp_path, sign):
        code = (
            "import signal, sys; from pathlib import Path\n"
            "from benchmarks.card import campaign, __main__ as command\n"
            "from benchmarks.card.job import Leg\n"
            "signal.signal(signal.SIGTERM, command._interrupt)\n"
            # A background job of a shell ignores it, and so would this process.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"legs = [Leg('fake', name, module={FAKES!r}) for name in ('works', 'hangs')]\n"
            "campaign.run(campaign.Campaign(Path(sys.argv[1]), Path('.'), is_rehearsal=True), legs)"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        process = subprocess.Popen(command, cwd=REPO, stderr=subprocess.DEVNULL)
        wait_for(lambda: found(tmp_path, "hangs") and str(tmp_path) in running())
        process.send_signal(sign)
        assert process.wait() != 0
        assert found(tmp_path, "works")[-1] == ("leg", "ended", None)
        assert found(tmp_path, "hangs") == [("64x64x1", "before", None)]
        if sign != signal.SIGKILL:  # what the leg itself has started outlives a SIGKILL of all
            wait_for(lambda: str(tmp_path) not in running())
        else:
            wait_for(lambda: "benchmarks.card.child" not in about(tmp_path))
            end_rest(tmp_path)


def about(folder: Path) -> str:
    return "\n".join(line for line in running().splitlines() if str(folder) in line)


def end_rest(folder: Path) -> None:
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder) in (place / "cmdline").read_bytes().decode(errors="replace"):
                os.kill(int(place.name), signal.SIGKILL)
        except OSError:
            continue


def wait_for(is_so) -> None:
    while not is_so():  # until the test's own limit
        time.sleep(0.1)


class TestRows:
    def test_a_line_cut_by_a_kill_is_left_out_and_the_next_row_is_whole(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows.append(path, {"a": 1})
        with path.open("a") as file:
            file.write('{"a": 2, "b')
        assert rows.read(path) == [{"a": 1}]
        rows.append(path, {"a": 3})
        assert rows.read(path) == [{"a": 1}, {"a": 3}]

    def test_a_row_with_an_error_is_measured_again(self, tmp_path):
        job = Job(leg("works"), tmp_path, REPO)
        recorder = rows.Recorder(job)
        recorder.write("64x64x1", "one", error="out of memory")
        assert not rows.Recorder(job).has("64x64x1", "one")
        recorder.write("64x64x1", "one", 1)
        again = rows.Recorder(job)
        assert again.has("64x64x1", "one", 1) and not again.has("64x64x1", "one", 2)
        other = rows.Recorder(Job(leg("other"), tmp_path, REPO))
        assert not other.has("64x64x1", "one", 1)

    @pytest.mark.parametrize(
        ("text", "wanted"),
        [
            (f"cannot open {os.sep}a{os.sep}b{os.sep}ae.safetensors", "cannot open ae.safetensors"),
            (f"no C:{BACK}users{BACK}me{BACK}main.py here", "no main.py here"),
            ("\n\n first line \nsecond", "first line"),
            ("1/2 of 3/4", "1/2 of 3/4"),
        ],
    )
    def test_errors_name_files_and_no_paths(self, text, wanted):
        assert rows.without_paths(text) == wanted

    @pytest.mark.parametrize("variable", rows.HIDDEN)
    def test_a_folder_with_a_space_is_hidden_where_it_is_known(
        self, tmp_path, monkeypatch, variable
    ):
        place = tmp_path / "my own" / "models"
        monkeypatch.setenv(variable, os.pathsep.join(["", str(place)]))
        assert rows.without_paths(f"cannot open {place}/vae/ae.safetensors") == (
            "cannot open ae.safetensors"
        )
        assert "own" not in rows.without_paths(f"{place} is full")

    def test_out_of_memory_is_told_as_that(self):
        import torch

        for error in (
            torch.OutOfMemoryError("tried to allocate"),
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        ):
            assert rows.error_text(error) == rows.OUT_OF_MEMORY

    def test_turns_repeat_rounds_whole_and_leave_out_what_failed(self, tmp_path):
        recorder = rows.Recorder(Job(leg("works"), tmp_path, REPO))
        for name in ("one", "two", "bad"):
            recorder.write("64x64x1", name, 0)
        recorder.write("64x64x1", "one", 1)
        taken = []
        for index, name in recorder.turns("64x64x1", ("one", "two", "bad"), range(3)):
            taken.append((index, name))
            recorder.write("64x64x1", name, index, error="no" if name == "bad" else None)
        assert taken == [(1, "one"), (1, "two"), (1, "bad"), (2, "one"), (2, "two")]

    def test_a_later_error_makes_a_row_missing_again(self, tmp_path):
        recorder = rows.Recorder(Job(leg("works"), tmp_path, REPO))
        recorder.write("64x64x1", "one")
        recorder.write("64x64x1", "one", error="out of memory")
        assert not recorder.has("64x64x1", "one")

    def test_what_cannot_be_measured_is_told_and_no_fault(self, tmp_path):
        recorder = rows.Recorder(Job(leg("works"), tmp_path, REPO))
        with recorder.attempt("64x64x1", "one"):
            raise rows.NotMeasuredError("this ComfyUI has no int4")
        assert rows.read(tmp_path / "rows.jsonl")[0]["error"] == (
            "not measured: this ComfyUI has no int4"
        )
        assert recorder.failures == 0

    def test_an_error_that_the_card_does_not_survive_ends_the_leg(self, tmp_path):
        recorder = rows.Recorder(Job(leg("works"), tmp_path, REPO))
        with pytest.raises(RuntimeError), recorder.attempt("64x64x1", "one"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        assert rows.read(tmp_path / "rows.jsonl")[0]["error"].startswith("RuntimeError: CUDA error")


class TestJobs:
    def test_a_job_survives_its_journey(self, tmp_path):
        job = Job(
            leg("works", card_gib=6.0, reads=("a", "b")),
            tmp_path,
            REPO,
            tmp_path / "models",
            True,
            12.5,
            "run",
        )
        assert from_json(job.to_json()) == job
        assert from_json(Job(leg("x"), tmp_path, REPO).to_json()).models_dir is None

    def test_pictures_read_back_as_written(self):
        assert picture(str(Picture(1024, 512, 4))) == Picture(1024, 512, 4)

    def test_the_legs_come_in_the_order_of_the_parts_and_the_default_fits_its_minutes(self):
        legs = catalogue.legs()
        order = list(dict.fromkeys(each.part for each in legs))
        assert tuple(order) == catalogue.PARTS
        assert len({(each.part, each.name) for each in legs}) == len(legs)
        assert sum(each.seconds for each in legs) <= 25 * 60
        assert sum(each.seconds for each in legs if each.part == "sanity") <= 60
        assert all(each.limit_s >= 2 * each.seconds for each in legs)

    def test_each_card_to_imitate_is_a_leg(self):
        legs = catalogue.legs(["budget"], [6.0, 12.0])
        assert [each.card_gib for each in legs] == [None, 12.0, 6.0]


class TestCommandLine:
    def command(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.card", *args],
            cwd=REPO, capture_output=True, text=True,
        )  # fmt: skip

    def test_a_folder_that_is_no_host_is_named(self, tmp_path):
        told = self.command("--host", str(tmp_path), "--rehearse")
        assert told.returncode == 2
        assert f"{tmp_path} is not a ComfyUI folder: it has no main.py" in told.stderr

    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("--minutes=0", "must be a number above 0, got 0"),
            ("--minutes=0.5", "--minutes must be >= 1, got 0.5"),
            ("--gib=-3", "must be a number above 0, got -3"),
            ("--part=nonsense", "invalid choice: 'nonsense'"),
            ("--models=nowhere", "nowhere is not a folder"),
        ],
    )
    def test_a_wrong_option_gets_one_sentence(self, tmp_path, option, said):
        (tmp_path / "main.py").touch()
        out = ["--rehearse", "--out", str(tmp_path / "out")]
        told = self.command("--host", str(tmp_path), *out, option)
        assert told.returncode == 2 and said in told.stderr
        assert len(told.stderr.splitlines()) == 1

    def test_a_folder_that_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "main.py").touch()
        told = self.command("--host", str(tmp_path), "--rehearse", "--out", f"{tmp_path}/main.py/x")
        assert told.returncode == 2
        assert f"cannot write to {tmp_path}/main.py/x (Not a directory)" in told.stderr

    def test_random_and_real_weights_do_not_share_a_folder(self, tmp_path):
        from pack.benchmarks.card import __main__ as command

        options = argparse.Namespace(out=tmp_path, models=None, rehearse=True)
        recorder = rows.Recorder(Job(leg("works"), tmp_path, REPO, tmp_path / "models"))
        recorder.write("64x64x1", "one")
        assert command.other_rows(options) == (
            f"{tmp_path} holds rows of other weights (real, not random): name a new --out"
        )
        options.models = tmp_path
        assert command.other_rows(options) is None

    def test_without_a_card_it_says_so_in_one_sentence(self, tmp_path):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a card here")
        (tmp_path / "main.py").touch()
        told = self.command("--host", str(tmp_path), "--out", str(tmp_path / "out"))
        assert told.returncode == 0
        assert told.stdout.startswith("bench card: not measured: torch ")
        assert "finds no NVIDIA card" in told.stdout
        assert not (tmp_path / "out").exists()


def test_rows_are_plain_json(tmp_path):
    recorder = rows.Recorder(Job(leg("works"), tmp_path, REPO))
    recorder.write("64x64x1", "one", step_s=0.5, note=None)
    [line] = (tmp_path / "rows.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert {"part", "leg", "run", "rehearsal", "pack", "weights", "card_gib"} < row.keys()
