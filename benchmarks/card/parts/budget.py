"""Whole runs from text to picture on the real server: the official template and Fit to VRAM.

One leg a card: as it is, or imitated by ballast that is held from before the first server until
after the last. Each variant has a fresh server. Peaks are sampled from this process, which has no
CUDA context, and count from what was in use right before the server started, so the server's own
context is in them. Per variant: 1024x1024 cold (round 0) and warm (round 1), then 2048x2048 on the
card as it is and from 2 GiB up (on an imitated card once), and on the card as it is one more run at
1024x1024 with VRAM Probes. Prefer smallest draws 1024x1024 alone. Seed and text change from run to
run, so that the host takes neither the text's encoding nor the picture from its cache. A variant
ends with its first run that fails.

The pack is installed for ComfyUI alone too: the run with probes needs it, and a node that is in no
graph changes nothing.
"""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pack.runner.graphs import PROMPT, with_fit, with_probes
from pack.runner.graphs import Picture as Drawn
from pack.runner.live_host import HostError, LiveHost
from pack.runner.model_files import Models, offer_models
from pack.runner.server_watch import watch
from PIL import Image

from .. import files, graphs, server
from ..ballast import ballast
from ..driver import DriverPeak, free_bytes
from ..job import Job, Picture
from ..rows import Recorder
from ..variants import HOST

FIT, SMALLEST = "Fit to VRAM", "Fit to VRAM smallest"
PREFER = {FIT: "balance", SMALLEST: "smallest"}
SIZES, REHEARSED = (Picture(1024, 1024), Picture(2048, 2048)), (Picture(64, 64),)
STEPS, REHEARSED_STEPS = 8, 2
LEAST_GIB_LARGE = 2.0  # a smaller card draws the first size alone
BELOW_GIB_SMALLEST = 6.0  # such a card is tried with prefer smallest too
RUN_LIMIT_S = 120.0
TILED = "retrying with tiled VAE decoding"  # in the log, comfy/sd.py


class Take(NamedTuple):
    """One run: its row, its seed, and whether VRAM Probes are in its graph."""

    picture: Picture
    case: str
    round: int
    seed: int
    has_probes: bool = False


class Bench(NamedTuple):
    """What all servers of the leg have in common.

    ballast_bytes: held by another process meanwhile.
    loader: which nodes read the models.
    """

    job: Job
    rows: Recorder
    models_dir: Path
    ballast_bytes: int
    loader: str


class Fresh(NamedTuple):
    """A server that has run nothing of another variant.

    known: the figures that all its rows share.
    plans: what Fit to VRAM said to each picture.
    """

    live: LiveHost
    peak: DriverPeak
    variant: str
    models: Models
    known: dict[str, Any]
    plans: dict[Picture, dict[str, Any]]


def run(job: Job, rows: Recorder) -> None:
    server.free_environment()
    models_dir = files.prepare(job, "whole")
    rows.facts |= server.machine_facts(job)
    found = offer_models(models_dir, _base_dir(job, "models"))
    with ballast(job.leg.card_gib) as held:
        loader = graphs.loader_of(found, is_small=job.is_rehearsal)
        bench = Bench(job, rows, models_dir, held, loader)
        for variant in variants(job):
            measure(bench, variant)


def variants(job: Job) -> tuple[str, ...]:
    card_gib = job.leg.card_gib
    is_small = card_gib is not None and card_gib < BELOW_GIB_SMALLEST
    return (HOST, FIT, SMALLEST) if is_small else (HOST, FIT)


def planned(job: Job, variant: str) -> list[Take]:
    """The runs of a variant; a seed belongs to a size and a round, whatever else is run."""
    card_gib = job.leg.card_gib
    sizes = REHEARSED if job.is_rehearsal else SIZES
    if variant == SMALLEST:
        sizes = sizes[:1]  # the next would take about RUN_LIMIT_S
    runs = [Take(sizes[0], str(sizes[0]), index, index) for index in (0, 1)]
    for size in sizes[1:]:
        if card_gib is None or card_gib >= LEAST_GIB_LARGE:
            rounds = (0, 1) if card_gib is None else (0,)
            runs += [Take(size, str(size), index, 10 + index) for index in rounds]
    if card_gib is None:
        runs.append(Take(sizes[0], f"{sizes[0]} with VRAM Probes", 1, 2, has_probes=True))
    return runs


def measure(bench: Bench, variant: str) -> None:
    """Rows of all runs of a variant that are missing, on one fresh server."""
    job, rows = bench.job, bench.rows
    takes = planned(job, variant)
    missing = {take.case for take in takes if not rows.has(take.case, variant, take.round)}
    takes = [take for take in takes if take.case in missing]  # all rounds: the first is cold
    if not takes:
        return
    base_dir = _base_dir(job, variant)
    models = offer_models(bench.models_dir, base_dir)
    before = server.resting_bytes()
    known = empty_figures(bench) | {"free_bytes": free_bytes()}
    try:
        with (
            DriverPeak(before) as peak,
            server.running(job, base_dir, models.paths_file) as live,
        ):
            rows.facts |= server.server_facts(live)
            fresh = Fresh(live, peak, variant, models, known, {})
            for take in takes:
                if not attempt(bench, fresh, take):
                    break
    except HostError as error:  # it did not start; what fails later has its row already
        told = {**known, "survived": False, "error": server.sentence(error)}
        rows.write(takes[0].case, variant, takes[0].round, **told)


def empty_figures(bench: Bench) -> dict[str, Any]:
    """Every field of a row, with what is known before a server runs."""
    names = (
        "survived", "peak_bytes", "free_bytes", "ram_peak_bytes", "seconds",
        *graphs.STAGES, "is_equal", "equal_8bit", "most_off_8bit", "psnr_db", "note",
    )  # fmt: skip
    return {
        **dict.fromkeys(names),
        **graphs.plan_figures(None),
        **graphs.probe_figures(None),
        "ballast_bytes": bench.ballast_bytes,
        "loader": bench.loader,
    }


def attempt(bench: Bench, fresh: Fresh, take: Take) -> bool:
    """Writes the row of one run; whether it came to its end."""
    live, peak, job = fresh.live, fresh.peak, bench.job
    logged, survived, notes = len(live.log()), False, []
    with bench.rows.attempt(take.case, fresh.variant, take.round) as figures:
        figures |= fresh.known
        graph = graph_for(job, fresh, take, bench.loader)
        peak.restart()
        try:
            with server.time_limit(live, RUN_LIMIT_S):
                watched = watch(live, graph, has_vram=False, say=lambda text: None)
        except server.RunLimitError as error:  # `survived` stays None
            figures["error"] = str(error)
        except HostError as error:
            told = {"survived": False, "error": server.sentence(error)}
            figures |= told | {"peak_bytes": peak.bytes}
        else:
            survived = True
            figures |= {"survived": True, "peak_bytes": peak.bytes, "seconds": watched.seconds}
            figures["ram_peak_bytes"] = max(row.ram_peak_bytes for row in watched.rows)
            for stage, nodes in graphs.STAGES.items():
                figures[stage] = sum(r.seconds for r in watched.rows if r.node in nodes)
            plan = graphs.plan_figures(watched.history)
            if plan["plan"] is not None:  # a node from the cache says nothing again
                fresh.plans[take.picture] = plan
            figures |= fresh.plans.get(take.picture, plan)
            figures |= graphs.probe_figures(watched.history if take.has_probes else None)
            picture = live.images(watched.history)[0]
            notes += compare(bench, fresh.variant, take, picture, figures)
        if TILED in live.log()[logged:]:
            notes.append("the VAE ran out of memory and decoded in tiles")
        if peak.bytes is None and not job.is_rehearsal:
            notes.append("no peak: no driver answers, or nvidia-ml-py is missing")
        figures["note"] = "; ".join(notes) or None
        bench.rows.facts["dtype"] = server.dtype_of(live.log())
    return survived


def graph_for(job: Job, fresh: Fresh, take: Take, loader: str) -> graphs.Graph:
    steps = REHEARSED_STEPS if job.is_rehearsal else STEPS
    drawn = Drawn(
        take.picture.width_px,
        take.picture.height_px,
        steps,
        take.seed,
        f"{PROMPT}, take {take.seed}",
    )
    graph = graphs.template(fresh.models, drawn, loader=loader)
    if fresh.variant != HOST:
        graph = with_fit(graph, PREFER[fresh.variant])
    return with_probes(graph) if take.has_probes else graph


def compare(
    bench: Bench, variant: str, take: Take, picture: bytes, figures: dict[str, Any]
) -> list[str]:
    """Sets how far a picture is from the host's of the same run on the card as it is; notes.

    That one is kept for the other variants and the legs of smaller cards.
    """
    weights = bench.rows.facts["weights"]
    path = bench.job.work / "pictures" / f"{weights}-{take.picture}-seed-{take.seed}.png"
    pixels = _pixels(picture)
    notes = ["the picture has one colour"] if pixels.min() == pixels.max() else []
    if variant == HOST and bench.job.leg.card_gib is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
        return notes
    if not path.exists():
        return [*notes, "no picture of ComfyUI on the card as it is to compare with"]
    off = np.abs(pixels - _pixels(path.read_bytes()))
    mean_square = float(np.mean(np.square(off, dtype=np.float64)))
    figures |= {
        "is_equal": not off.any(),
        "equal_8bit": float(np.mean(off == 0)),
        "most_off_8bit": int(off.max()),
        "psnr_db": 10 * math.log10(255**2 / mean_square) if mean_square else None,
    }
    return notes


def _pixels(picture: bytes) -> np.ndarray:
    """[H, W, 3], int16, so that differences have a sign."""
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def _base_dir(job: Job, name: str) -> Path:
    slug = re.sub(r"[^a-z0-9.]+", "-", f"{job.leg.name} {name}".lower())
    return job.work / "servers" / slug
