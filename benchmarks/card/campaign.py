"""Runs the legs one after the other, each in a process of its own. Standard library only.

Every row is on disk before the next is measured, so whatever ends a leg, its limit, a crash or a
kill of all, loses at most what was being measured. A leg that ended is not run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pack.nodes.units import GIB
from pack.runner.live_host import DIE_WITH_PARENT, REPO

from . import driver, rows
from .job import ALLOCATOR_SETTINGS, Job, Leg

# The rows that tell how a leg ended; `variant` is one of the words below.
LEG_CASE = "leg"
ENDED, FAILED, OUT_OF_TIME, LEFT_OUT = "ended", "failed", "out of time", "left out"
LEAST_SECONDS = 20.0  # with less left no leg is started
SHARE = 0.95  # of a card's memory, of what an imitated one may have
STOP_S = 10.0


@dataclass(frozen=True)
class Campaign:
    """How the legs are run.

    folder: gets rows.jsonl, report.md, the plot, and work/ with models and logs.
    host_dir: an unpacked ComfyUI.
    models_dir: real weights; None for random ones.
    minutes: for all legs of this call together.
    is_rehearsal: on the CPU at tiny sizes.
    """

    folder: Path
    host_dir: Path
    models_dir: Path | None = None
    minutes: float = 25.0
    is_rehearsal: bool = False


def ends(folder: Path) -> dict[tuple[str, str], tuple[str, int]]:
    """How each leg ended last, by part and name, and at which row."""
    found = enumerate(rows.read(folder / "rows.jsonl"))
    return {
        (row["part"], row["leg"]): (row["variant"], index)
        for index, row in found
        if row["case"] == LEG_CASE
    }


def left_to_do(folder: Path, legs: Iterable[Leg]) -> list[Leg]:
    """The legs that have not ended yet; those that failed come last.

    A leg that reads other parts' rows is left again when one of them has ended after it.
    """
    known = ends(folder)

    def is_left(leg: Leg) -> bool:
        how, index = known.get((leg.part, leg.name), ("", -1))
        read = [at for (part, _), (end, at) in known.items() if part in leg.reads and end == ENDED]
        return how not in (ENDED, LEFT_OUT) or max(read, default=-1) > index

    def is_failed(leg: Leg) -> bool:
        return known.get((leg.part, leg.name), ("", -1))[0] == FAILED

    return sorted(filter(is_left, legs), key=is_failed)


def left_out(leg: Leg, *, is_rehearsal: bool) -> str:
    """Why a leg cannot run here at all; empty if it can."""
    if is_rehearsal:
        return leg.needs_card
    total = driver.total_bytes()
    if leg.card_gib is not None and total is not None and leg.card_gib * GIB >= SHARE * total:
        return f"this card has {total / GIB:.1f} GiB: it cannot imitate a larger one"
    return ""


def run(campaign: Campaign, legs: Sequence[Leg]) -> bool:
    """Runs what is left of the legs within the minutes; True if every leg has ended well by now.

    Raises:
        KeyboardInterrupt: after the running leg's processes have been ended.
    """
    places = [campaign.folder, campaign.models_dir or campaign.folder]
    os.environ[rows.HIDDEN[0]] = os.pathsep.join(str(place) for place in places)
    end = time.time() + 60 * campaign.minutes
    told = Job(
        Leg(""), campaign.folder, campaign.host_dir, campaign.models_dir, campaign.is_rehearsal,
        run=time.strftime("%Y-%m-%dT%H:%M:%S"), pack=pack_version(),
    )  # fmt: skip
    jobs = []
    for leg in left_to_do(campaign.folder, legs):
        job = dataclasses.replace(told, leg=leg)
        if reason := left_out(leg, is_rehearsal=campaign.is_rehearsal):
            _note(job, LEFT_OUT, note=reason)
        else:
            jobs.append(job)
    is_whole, is_started = True, False
    for index, job in enumerate(jobs, 1):
        leg, seconds = job.leg, end - time.time()
        print(f"[{index}/{len(jobs)}] {leg.title}", end="", flush=True)
        if seconds < LEAST_SECONDS or (is_started and seconds < leg.seconds):
            print(": not enough time is left")
            is_whole = False
            continue
        print(flush=True)
        is_started = True
        limit = min(leg.limit_s, seconds)
        is_whole &= _run_leg(dataclasses.replace(job, deadline=time.time() + limit), limit)
    return is_whole


def pack_version() -> str:
    """Version and commit of this project, with "+" where files differ from the commit."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    command = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        git = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
        commit = git.stdout.strip() if git.returncode == 0 else ""
    except OSError:  # no git here
        commit = ""
    return " ".join(filter(None, [found[1] if found else "", commit or "commit not known"]))


def _run_leg(job: Job, limit_s: float) -> bool:
    """Runs one leg's process to its end; notes how it ended."""
    log = job.work / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', job.leg.title.lower())}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.card.child", job.to_json()]
    before, start = len(rows.read(job.rows_path)), time.monotonic()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=REPO, env=_environment(job), stderr=errors, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=DIE_WITH_PARENT,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        _note(job, ENDED, seconds=seconds)
        return True
    if code is None and limit_s < job.leg.limit_s:  # cut by --minutes: the next call goes on
        print("  cut: the time is up")
        _note(job, OUT_OF_TIME, seconds=seconds)
        return False
    last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
    new = rows.read(job.rows_path)[before:]
    told = [row["error"] for row in new if not rows.is_result(row)]
    if code is None:
        error = f"ended after its limit of {limit_s:.0f} s"
    elif code == 1 and told:
        error = told[-1] if len(told) == 1 else f"{len(told)} rows without a result: {told[-1]}"
    else:
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        error = f"ended with {end}: {rows.without_paths(last)}"
    print(f"  {job.leg.title}: {error} (the next part goes on; log: {log})", flush=True)
    _note(job, FAILED, seconds=seconds, error=error)
    return False


def _note(job: Job, how: str, **figures: object) -> None:
    leg = job.leg
    row = {
        "part": leg.part, "leg": leg.name, "run": job.run, "rehearsal": job.is_rehearsal,
        "case": LEG_CASE, "variant": how, "round": 0, "error": None, **figures,
    }  # fmt: skip
    rows.append(job.rows_path, row)


def _environment(job: Job) -> dict[str, str]:
    told = {
        ALLOCATOR_SETTINGS[0]: f"backend:{job.leg.allocator}",
        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1",
        "ZIMAGE_HOST_DIR": str(job.host_dir),
        # The first card is then the same one for torch and for the driver's tools.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_SETTINGS}
    if job.is_rehearsal:  # two spinning threads and a busy neighbour make a second take fifteen
        told["OMP_NUM_THREADS"] = "1"
    return {**kept, **told}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what the leg may have left running: its whole process group."""
    if os.name == "nt":
        process.kill()
        process.wait()
        return
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        if process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
