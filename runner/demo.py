"""The example workflow on a real ComfyUI server, without and with our nodes, measured.

Started by `python run.py demo`, which makes the environment first.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pack.runner.demo_figures import Compared, Taken
from pack.runner.environment import ROOT, SetupError
from pack.runner.graphs import (
    PROBE,
    PROMPT,
    STEPS,
    Graph,
    Picture,
    example_prompt,
    one_step,
    probe_record,
    with_fit,
    with_probes,
)
from pack.runner.live_host import HostError, LiveHost
from pack.runner.model_files import offer_models
from pack.runner.server_watch import Watched, watch

SIZE_CPU_PX = 256
SIZE_GPU_PX = 1024
STEPS_RANDOM = 4  # on a CPU; the picture is noise anyway
# What the host says about devices and dtypes when it loads the models.
LOG_FACTS = re.compile(r"(?:Device:|model weight dtype|VAE load device|CLIP/text encoder model).*")


class DemoResult(NamedTuple):
    """What a demo made.

    path, chart_path: the picture with our nodes, and the memory chart.
    watched: the run with our nodes.
    compared: that run and the same one without them.
    facts: the server's lines on devices.
    """

    path: Path
    chart_path: Path
    watched: Watched
    compared: Compared
    facts: list[str]


def random_models(demo_dir: Path) -> Path:
    """A models folder with random weights of the true widths and few layers; made once."""
    folder = demo_dir / "models"
    target = folder / "diffusers" / "Z-Image-Turbo"
    if not target.is_dir():
        part = demo_dir / "models.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        command = [sys.executable, "-m", "testing.tiny_models", "real-folder", str(part)]
        result = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", cwd=ROOT
        )
        if result.returncode != 0:
            last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SetupError(f"writing the random weights failed: {last}")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, target)  # last, so that a folder in this place is whole
    return folder


def run_demo(
    host_dir: Path,
    demo_dir: Path,
    picture: Picture,
    *,
    models_dir: Path | None = None,
    cpu: bool = True,
    keep_open: bool = False,
    host_args: Sequence[str] = (),
) -> DemoResult:
    """Starts the host, runs the example workflow and prints what happens.

    Args:
        host_dir: an unpacked ComfyUI.
        demo_dir: everything that is written lies below it.
        picture: what to draw.
        models_dir: real weights; None: random ones are written.
        cpu: use no GPU.
        keep_open: leave the server running until Ctrl-C.
        host_args: more arguments for the host.

    Raises:
        SetupError, HostError: with one sentence for the user.
    """
    base_dir = demo_dir / "base"
    if models_dir is None:
        print("Writing random weights of the true widths, few layers (--models: real ones) ...")
    models = offer_models(models_dir or random_models(demo_dir), base_dir)
    named = ", ".join(models[:3])
    print(f"Models: {named}\nStarting the server ...", flush=True)
    started = time.monotonic()
    server = LiveHost(
        host_dir, base_dir, cpu=cpu, extra_model_paths=models.paths_file, args=host_args
    )
    with server:
        stats = server.get_json("/system_stats")
        device = stats["devices"][0]
        system = stats["system"]
        print(
            f"ComfyUI {system['comfyui_version']}, torch {system['pytorch_version']}, "
            f"Python {system['python_version'].split()[0]}, device {device['name']} "
            f"({time.monotonic() - started:.0f} s)\n"
            f"Drawing {picture.width}x{picture.height}, {picture.steps} steps, "
            f"seed {picture.seed}: {picture.text}",
            flush=True,
        )
        has_vram = device["type"] != "cpu"
        compared = compare(server, example_prompt(models, picture), picture, has_vram=has_vram)
        output = demo_dir / "output"
        output.mkdir(parents=True, exist_ok=True)
        path = output / f"z_image_turbo_{picture.width}x{picture.height}_{picture.seed}.png"
        path.write_bytes(compared.ours.picture)
        chart_path = path.with_name(f"{path.stem}_memory.svg")
        chart_path.write_text(compared.chart(), encoding="utf-8", newline="\n")
        facts = list(dict.fromkeys(LOG_FACTS.findall(server.log())))
        watched = compared.ours.watched
        print("\nThe server's log:", *facts, "", watched.table(), "", sep="\n")
        print(f"{compared.text()}\n\nMemory chart: {chart_path}")
        if models_dir is None:
            print("random weights: the picture is noise by design")
        print(f"Picture: {path}", flush=True)
        if keep_open:
            print(f"The server stays open: {server.url} (Ctrl-C ends it)", flush=True)
            while True:
                time.sleep(1)
                server.check_alive()
    return DemoResult(path, chart_path, watched, compared, facts)


def compare(server: LiveHost, prompt: Graph, picture: Picture, *, has_vram: bool) -> Compared:
    """Runs a graph as it is and with Fit to VRAM, and measures both.

    Raises:
        HostError: the run with Fit to VRAM failed, or the server died.
    """
    device = "the card" if has_vram else "the CPU"
    shape = f"{picture.width}x{picture.height}, {picture.steps} steps, on {device}"
    if has_vram:  # the first steps also bring weights to the card, which is no part of either way
        with contextlib.suppress(HostError):
            watch(server, one_step(with_probes(prompt)), has_vram=True, say=_say_nothing)
    alone, failed = None, ""
    print("ComfyUI alone:", flush=True)
    try:
        alone = _taken(server, prompt, has_vram=has_vram)
    except HostError as error:
        server.check_alive()
        failed = str(error)
        print(f"  {failed}")
    print("With Fit to VRAM:", flush=True)
    ours = _taken(server, with_fit(prompt, "balance"), has_vram=has_vram)
    return Compared(shape, alone, ours, has_vram, failed)


def _taken(server: LiveHost, prompt: Graph, *, has_vram: bool) -> Taken:
    """Runs a graph; without a card, one more step with every operation watched."""
    graph = with_probes(prompt, "steps" if has_vram else "totals")
    watched = watch(server, graph, has_vram=has_vram, say=_say)
    records = {stage: probe_record(watched.history, stage) for stage in ("sampling", "decode")}
    if not has_vram:
        print("  one more step with every operation watched ...", flush=True)
        again = watch(server, one_step(graph), has_vram=False, say=_say_nothing)
        records["sampling"] = probe_record(again.history, "sampling")
    return Taken(watched, records, server.images(watched.history)[0])


def _say(text: str) -> None:
    if not text.startswith(PROBE):
        print(f"  {text}", flush=True)


def _say_nothing(text: str) -> None:
    pass


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="run.py demo", description=__doc__)
    parser.add_argument("--host-dir", type=Path, required=True)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--keep-open", action="store_true")
    options = parser.parse_args(argv)
    try:
        side = SIZE_CPU_PX if options.cpu else SIZE_GPU_PX
        steps = STEPS_RANDOM if options.cpu and options.models is None else STEPS
        seed = random.getrandbits(32) if options.seed is None else options.seed
        run_demo(
            options.host_dir,
            ROOT / ".demo",
            Picture(
                options.width or side,
                options.height or side,
                options.steps or steps,
                seed,
                options.prompt,
            ),
            models_dir=options.models,
            cpu=options.cpu,
            keep_open=options.keep_open,
        )
    except (SetupError, HostError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
