"""The commands demo, host, bench and plan of run.py. Standard library only."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from . import environment, live_host, model_files
from .plan import report
from .setup import Steps, choose_host, needs_cpu, prepare

NO_BENCHMARKS = ("__init__.py", "documents.py", "rows.py", "vae_measures.py", "vae_ways.py")


def _chosen_host(options: argparse.Namespace, steps: Steps) -> tuple[Path, Path]:
    """Python and folder of the ComfyUI that the options name; makes the environment first."""
    prepare(steps)
    steps(f"ComfyUI to run: {options.comfyui or options.version}")
    return choose_host(options.version, options.comfyui)


def demo(options: argparse.Namespace, rest: list[str]) -> int:
    steps = Steps(5)
    python, host_dir = _chosen_host(options, steps)
    steps("Demo")
    command = [python, "-m", "runner.demo", "--host-dir", host_dir, *rest]
    if options.models:
        command += ["--models", options.models.expanduser().resolve()]
    if needs_cpu(python, options.cpu):
        command.append("--cpu")
    return environment.call(command, PYTHONDONTWRITEBYTECODE="1", PYTHONUTF8="1")


def host(options: argparse.Namespace, rest: list[str]) -> int:
    steps = Steps(5)
    python, host_dir = _chosen_host(options, steps)
    steps("Starting the server")
    base_dir = environment.ROOT / ".demo" / "base"
    models = model_files.offer_models(options.models, base_dir) if options.models else None
    server = live_host.LiveHost(
        host_dir,
        base_dir,
        python=str(python),
        args=rest,
        extra_model_paths=models.paths_file if models else None,
        cpu=needs_cpu(python, options.cpu),
        port=options.port,
    )
    try:
        with server, server.log_path.open(encoding="utf-8", errors="replace") as log:
            print(f"ComfyUI with this pack: {server.url} (Ctrl-C ends it)", flush=True)
            while True:
                print(log.read(), end="", flush=True)
                server.check_alive()
                time.sleep(0.5)
    except live_host.HostError as error:
        raise environment.SetupError(str(error)) from None
    except KeyboardInterrupt:
        print("\nComfyUI has ended.")
        return 0


def benchmark_names() -> list[str]:
    """The scripts that `bench` runs, by name, and the folders that are one."""
    folder = environment.ROOT / "benchmarks"
    scripts = [path.stem for path in folder.glob("*.py") if path.name not in NO_BENCHMARKS]
    return sorted([*scripts, *(path.parent.name for path in folder.glob("*/__main__.py"))])


def bench(options: argparse.Namespace, rest: list[str]) -> int:
    scripts = benchmark_names()
    if options.name:
        if options.name not in scripts:
            raise environment.SetupError(f"no benchmark {options.name}; there are: {scripts}")
        scripts = [options.name]
    steps = Steps(3 + len(scripts))
    prepare(steps, with_tools=True)
    python, host_dir = choose_host(options.version, None)
    failed = 0
    for script in scripts:
        steps(f"bench {script}")
        command = [python, "-m", f"benchmarks.{script}", *options.args, *rest]
        told = {"ZIMAGE_HOST_DIR": str(host_dir), "ZIMAGE_CALLED_FROM": os.getcwd()}
        failed += environment.call(command, **told) != 0
    if not options.name:
        print(f"{len(scripts) - failed} of {len(scripts)} benchmarks ran")
    return 1 if failed else 0


def plan(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        text, is_possible = report(options)
    except ValueError as error:
        raise environment.SetupError(str(error)) from None
    except OverflowError:
        raise environment.SetupError("a number is too large to plan with") from None
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough, as `head` has; the rest goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if is_possible else 1
