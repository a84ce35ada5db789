"""What VRAM Probe costs per sampling step, on the CPU, by its detail.

    python run.py bench probe_overhead [--pairs N] [--steps N]

The model has Z-Image's widths, one main layer and its four refiners, with random float32 weights.
The host samples it at 128x128 in one thread, whose own time is taken, so that neighbours on the
machine count little. Two figures for each detail:

- own time: what passes inside of the probe while a step runs, its readings and its events to the
  page apart. It is what one compares with the time of a step of one's own; there are at most 8
  events in a second, however many blocks there are.
- ratio: a sampling with the probe against one without, in pairs, median of the steps. It includes
  what the probe slows down outside of itself, and the noise of the machine.

On a CPU the details blocks and allocations watch every operation. "blocks, counter only" reads a
counter at the end of each block instead, as on a GPU: here it is the process' memory, whose reading
is a file; a GPU's allocator is asked by one call of torch. The times on a GPU: not measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __package__:
    from .load_ram import REPO, register_pack
else:
    from load_ram import REPO, register_pack

RESULTS = REPO / "benchmarks" / "results" / "probe_overhead.jsonl"
TARGETS = {"totals": 0.005, "steps": 0.01, "blocks, counter only": 0.03}
VARIANTS = ("totals", "steps", "blocks, counter only", "blocks", "allocations")
SIDE_PX = 128


class Timed(NamedTuple):
    """Seconds of each step; seconds per step inside of the probe, and per event."""

    steps: list[float]
    reading: float
    events: float
    event: float


def make_model() -> Any:
    """The host's Z-Image at full width with one main layer."""
    from pack.tests.host import lean_models

    config = {
        **lean_models.Z_IMAGE,
        "dim": 3840,
        "n_heads": 30,
        "n_kv_heads": 30,
        "n_layers": 1,
    }
    return lean_models.built("ZImage", config)


@contextmanager
def clocked(*, counter_only: bool) -> Iterator[dict[str, float]]:
    """Counts seconds inside of the probe: of its points, of them in events, and the events."""
    from pack.nodes.host import probe_sampling
    from pack.nodes.host.probe_run import SamplingRun

    spent = {"points": 0.0, "events": 0.0, "count": 0.0}

    class Clocked(SamplingRun):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if counter_only:
                self._is_tracked = False
            spent.update(points=0.0, events=0.0, count=0)

        def point(self, block: str | None) -> None:
            start = time.thread_time()
            super().point(block)
            spent["points"] += time.thread_time() - start

        def _show(self, record: Any) -> None:
            start = time.thread_time()
            super()._show(record)
            spent["events"] += time.thread_time() - start
            spent["count"] += 1

        def end(self, state: str) -> None:
            before = dict(spent)
            super().end(state)
            spent.update(before)  # the end is no part of a step

    probe_sampling.SamplingRun = Clocked
    try:
        yield spent
    finally:
        probe_sampling.SamplingRun = SamplingRun


def sample(model: Any, steps: int) -> list[float]:
    """Samples, and returns the seconds of each step but the first, which warms up."""
    import comfy.sample
    from pack.tests.host import lean_models

    marks: list[float] = []
    noise = lean_models.latent(SIDE_PX // 8)
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, steps + 1, 1.0, "euler", "simple", lean_models.prompt(),
            lean_models.prompt(seed=5), torch.zeros_like(noise), seed=1, disable_pbar=True,
            callback=lambda *_: marks.append(time.thread_time()),
        )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(marks)]


def probed(model: Any, variant: str, steps: int) -> Timed:
    """One sampling behind a probe."""
    from pack.nodes.vram_probe import VRAMProbe

    with clocked(counter_only=variant == "blocks, counter only") as spent:
        watched = VRAMProbe.execute(model, detail=variant.split(",")[0]).args[0]
        seconds = sample(watched, steps)
    reading = spent["points"] - spent["events"]
    each = spent["events"] / max(spent["count"], 1)
    return Timed(seconds, reading / (steps + 1), spent["events"] / (steps + 1), each)


def measure(model: Any, variant: str, *, pairs: int, steps: int) -> dict[str, Any]:
    """One row of the table."""
    ratios, runs, plain = [], [], []
    for _ in range(pairs):
        before = sample(model, steps)
        timed = probed(model, variant, steps)
        plain += before
        runs.append(timed)
        ratios.append(statistics.median(timed.steps) / statistics.median(before))
    denoiser = model.get_model_object("diffusion_model")
    blocks = len(denoiser.layers) + len(denoiser.noise_refiner) + len(denoiser.context_refiner)
    return {
        "detail": variant, "pairs": pairs, "steps": steps, "blocks": blocks,
        "reading_microseconds": statistics.median(r.reading for r in runs) * 1e6,
        "events_microseconds": statistics.median(r.events for r in runs) * 1e6,
        "one_event_microseconds": statistics.median(r.event for r in runs) * 1e6,
        "step_seconds": statistics.median(plain),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    host_dir = os.environ["ZIMAGE_HOST_DIR"]
    with tempfile.TemporaryDirectory() as base_dir:
        sys.path.insert(0, host_dir)
        from comfy.cli_args import args

        args.cpu, args.base_directory, args.use_pytorch_cross_attention = True, base_dir, True
        import folder_paths  # noqa: F401 (before the pack's nodes, which write below it)

        register_pack()
        model = make_model()
        rows = [
            measure(model, variant, pairs=options.pairs, steps=options.steps)
            for variant in VARIANTS
        ]
    version = Path(host_dir, "comfyui_version.py").read_text().split('"')[1]
    known = {
        "host": version, "torch": torch.__version__, "dtype": "float32",
        "device": f"cpu {platform.machine()}, 1 thread", "size": f"{SIDE_PX}x{SIDE_PX}",
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("".join(json.dumps({**row, **known}) + "\n" for row in rows))
    show(rows, f"ComfyUI {version}, torch {torch.__version__}")


def show(rows: list[dict[str, Any]], versions: str) -> None:
    first = rows[0]
    print(
        f"VRAM Probe, {first['blocks']} blocks of Z-Image's width, {SIDE_PX}x{SIDE_PX}, float32, "
        f"CPU, 1 thread, a step of {first['step_seconds']:.2f} s. {versions}."
    )
    print("\n| detail | readings per step | events per step | of the step | step with / without |")
    print("|---|---|---|---|---|")
    for row in rows:
        own = row["reading_microseconds"] + row["events_microseconds"]
        target = TARGETS.get(row["detail"])
        aim = "" if target is None else f" (target {100 * target:.1f} %)"
        print(
            f"| {row['detail']} | {row['reading_microseconds']:.0f} us | "
            f"{row['events_microseconds']:.0f} us | {own / 1e4 / row['step_seconds']:.3f} %{aim} | "
            f"{row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f}) |"
        )
    counted = next(row for row in rows if row["detail"] == "blocks, counter only")
    points = counted["blocks"] + 2  # behind the blocks and behind the step
    print(
        f"\nOne reading takes {counted['reading_microseconds'] / points:.0f} us, one event "
        f"{counted['one_event_microseconds']:.0f} us."
    )


if __name__ == "__main__":
    main()
