"""What VRAM Probe costs per sampling step, on the CPU, by its detail.

    python run.py bench probe_overhead [--side PX] [--pairs N] [--steps N] [--heads N]
        [--details D ...]

The model has Z-Image's widths, one main layer and its four refiners, with random float32 weights.
The host samples it in one thread, whose own time is taken. What the probe costs is counted, so that
it does not depend on what else the machine does:

- readings and events: what passes inside of the probe while a step runs. There are at most 8 events
  in a second, however many blocks there are.
- watching: on a CPU the details blocks and allocations watch every operation. Time per watched
  operation times the operations of a step. The first is taken on the same model at a tenth of its
  widths and 64x64, where the arithmetic hides little of it: the fastest of many steps with the
  tracker less the fastest without, over the number of operations.

The ratio is a check with a stopwatch: a sampling with the probe against the mean of one before and
one after it without; beside it the one after against the one before, which is the machine's noise.

"blocks, counter only" reads a counter at the end of each block instead, as on a GPU: here it is the
process' memory, whose reading is a file; a GPU's allocator is asked by one call of torch. The times
on a GPU: not measured. Rows of other sizes and details are kept. `--heads` makes a narrower model:
it only tries the script.
"""

from __future__ import annotations

import argparse
import itertools
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

from .rows import RESULTS_DIR, read, write
from .shown import probe_overhead as shown
from .shown.probe_overhead import COUNTER_ONLY

RESULTS = RESULTS_DIR / "probe_overhead.jsonl"
VARIANTS = ("totals", "steps", COUNTER_ONLY, "blocks", "allocations")
WATCHED = ("blocks", "allocations")
SMALL_SIDE_PX = 64
HEADS, HEAD_DIM = 30, 128  # Z-Image's


class Timed(NamedTuple):
    """Seconds of each step; seconds per step inside of the probe, and per event."""

    steps: list[float]
    reading: float
    events: float
    event: float


def make_model(heads: int) -> Any:
    """The host's Z-Image with so many heads of 128, 30 being the full width, and one main layer."""
    from pack.testing import lean_models

    widths = {"dim": HEAD_DIM * heads, "n_heads": heads, "n_kv_heads": heads, "n_layers": 1}
    return lean_models.built("ZImage", {**lean_models.Z_IMAGE, **widths})


@contextmanager
def clocked(*, counter_only: bool) -> Iterator[dict[str, float]]:
    """Counts seconds inside of the probe: of its points, of them in events, and the events."""
    from pack.nodes.host.probe import wrappers
    from pack.nodes.host.probe.sampling import Sampling

    spent = {"points": 0.0, "events": 0.0, "count": 0.0}

    class Clocked(Sampling):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            if counter_only:
                self._is_tracked = False
            spent.update(points=0.0, events=0.0, count=0)

        def point(self, *args: Any, **kwargs: Any) -> None:
            start = time.thread_time()
            super().point(*args, **kwargs)
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

    wrappers.Sampling = Clocked
    try:
        yield spent
    finally:
        wrappers.Sampling = Sampling


def sample(model: Any, steps: int, side_px: int) -> list[float]:
    """Samples, and returns the seconds of each step but the first, which warms up."""
    import comfy.sample
    from pack.testing import lean_models

    marks: list[float] = []
    noise = lean_models.latent(side_px // 8)
    with torch.inference_mode():
        comfy.sample.sample(
            model, noise, steps + 1, 1.0, "euler", "simple", lean_models.prompt(),
            lean_models.prompt(seed=5), torch.zeros_like(noise), seed=1, disable_pbar=True,
            callback=lambda *_: marks.append(time.thread_time()),
        )  # fmt: skip
    return [after - before for before, after in itertools.pairwise(marks)]


def probed(model: Any, variant: str, steps: int, side_px: int) -> Timed:
    """One sampling behind a probe."""
    from pack.nodes.vram_probe import VRAMProbe

    with clocked(counter_only=variant == COUNTER_ONLY) as spent:
        watched = VRAMProbe.execute(model, detail=variant.split(",")[0]).args[0]
        seconds = sample(watched, steps, side_px)
    reading = spent["points"] - spent["events"]
    each = spent["events"] / max(spent["count"], 1)
    return Timed(seconds, reading / (steps + 1), spent["events"] / (steps + 1), each)


def operations(model: Any, side_px: int) -> int:
    """How many operations a step has, those inside of composite ones apart and together."""
    from pack.nodes.probe.tracker import PeakTracker

    class Counted(PeakTracker):
        count = 0

        def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return super().__torch_dispatch__(*args, **kwargs)

    counts = []
    for steps in (1, 2):
        with Counted() as counted:
            sample(model, steps, side_px)
        counts.append(counted.count)
    return counts[1] - counts[0]


def watching_seconds(*, trace: bool) -> float:
    """What the tracker takes for an operation."""
    from pack.nodes.probe.tracker import PeakTracker

    model = make_model(3)
    plain, watched = [], []
    for _ in range(10):
        plain += sample(model, 6, SMALL_SIDE_PX)
        with PeakTracker(trace=trace, log=trace):
            watched += sample(model, 6, SMALL_SIDE_PX)
    return (min(watched) - min(plain)) / operations(model, SMALL_SIDE_PX)


def measure(model: Any, variant: str, *, pairs: int, steps: int, side_px: int) -> dict[str, Any]:
    """One row of the table."""
    ratios, nulls, runs, plain = [], [], [], []
    for _ in range(pairs):
        before = sample(model, steps, side_px)
        runs.append(probed(model, variant, steps, side_px))
        after = sample(model, steps, side_px)
        plain += before + after
        first, second = statistics.median(before), statistics.median(after)
        ratios.append(2 * statistics.median(runs[-1].steps) / (first + second))
        nulls.append(second / first)
    denoiser = model.get_model_object("diffusion_model")
    blocks = len(denoiser.layers) + len(denoiser.noise_refiner) + len(denoiser.context_refiner)
    row = {
        "detail": variant, "dim": denoiser.dim, "size": f"{side_px}x{side_px}",
        "pairs": pairs, "steps": steps, "blocks": blocks,
        "reading_microseconds": statistics.median(r.reading for r in runs) * 1e6,
        "events_microseconds": statistics.median(r.events for r in runs) * 1e6,
        "one_event_microseconds": statistics.median(r.event for r in runs) * 1e6,
        "operations": 0, "operation_microseconds": 0.0,
        "step_seconds": statistics.median(plain),
        "ratios": ratios, "noise": nulls,
    }  # fmt: skip
    if variant in WATCHED:
        row["operations"] = operations(model, side_px)
        row["operation_microseconds"] = watching_seconds(trace=variant == "allocations") * 1e6
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    # One head of 128 is narrower than the 256 channels of the host's modulation.
    parser.add_argument(
        "--heads", type=int, choices=range(2, HEADS + 1), default=HEADS, metavar="N"
    )
    parser.add_argument("--details", nargs="+", choices=VARIANTS, default=VARIANTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    host_dir = os.environ["ZIMAGE_HOST_DIR"]
    with tempfile.TemporaryDirectory() as base_dir:
        sys.path.insert(0, host_dir)
        from comfy.cli_args import args

        args.cpu, args.base_directory, args.use_pytorch_cross_attention = True, base_dir, True
        import folder_paths  # noqa: F401 (before the pack's nodes, which write below it)

        model = make_model(options.heads)
        sample(model, 1, options.side)
        measured = [
            measure(model, variant, pairs=options.pairs, steps=options.steps, side_px=options.side)
            for variant in options.details
        ]
    version = Path(host_dir, "comfyui_version.py").read_text().split('"')[1]
    known = {
        "host": version, "torch": torch.__version__, "dtype": "float32",
        "device": f"cpu {platform.machine()}, 1 thread",
    }  # fmt: skip
    kept = keep([{**row, **known} for row in measured])
    rows = [row for row in kept if row["dim"] == HEAD_DIM * options.heads]
    show(rows, f"ComfyUI {version}, torch {torch.__version__}")


def keep(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Writes these rows in place of those of the same sizes and detail; returns all."""

    def place(row: dict[str, Any]) -> tuple[int, int, int]:
        return row["dim"], int(row["size"].split("x")[0]), VARIANTS.index(row["detail"])

    rows = {place(row): row for row in [*read(RESULTS), *measured]}
    ordered = [rows[key] for key in sorted(rows)]
    write(RESULTS, ordered)
    return ordered


def show(rows: list[dict[str, Any]], versions: str) -> None:
    width = "Z-Image's width" if rows[0]["dim"] == HEADS * HEAD_DIM else f"width {rows[0]['dim']}"
    print(
        f"VRAM Probe, {rows[0]['blocks']} blocks of {width}, float32, CPU, 1 thread, "
        f"thread time. {versions}.\n"
    )
    made = shown.tables(rows)
    print(made["probe_overhead"])
    print("By the stopwatch, a step with the probe against one without, and two without:\n")
    print(made["probe_stopwatch"], end="")


if __name__ == "__main__":
    main()
