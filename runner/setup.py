"""What the commands of run.py have in common: the environment, the host, the numbered steps.

Standard library only.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
from pathlib import Path

from . import environment

DEFAULT_HOST = "0.30.0"
OLDEST_HOST = "0.16.3"  # equals requires-comfyui in pyproject.toml
FIND_ACCELERATOR = "import torch; print(torch.accelerator.is_available())"


class Steps:
    """Numbered one-line statements with the seconds since the start."""

    def __init__(self, count: int):
        self.count, self.start = count, time.monotonic()
        self.begun: list[tuple[str, float]] = []  # each step and when it began

    def __call__(self, text: str) -> None:
        self.begun.append((text, time.monotonic()))
        seconds = self.begun[-1][1] - self.start
        print(f"[{len(self.begun)}/{self.count}] {text} ({seconds:.0f} s)", flush=True)

    def durations(self) -> list[tuple[str, float]]:
        """Each step with the seconds that it took; the last one ends now."""
        ends = [*(begin for _, begin in self.begun[1:]), time.monotonic()]
        return [(text, end - begin) for (text, begin), end in zip(self.begun, ends, strict=True)]


def prepare(steps: Steps, *, with_tools: bool = False) -> Path:
    """The Python of .venv with the default host's requirements: three steps.

    Args:
        with_tools: also what tests and benchmarks need.
    """
    steps("Python environment in .venv")
    python = environment.make_venv(environment.VENV)
    steps(f"ComfyUI {DEFAULT_HOST} in .host")
    default_host = environment.fetch_host(python, DEFAULT_HOST)
    base, task = environment.base_requirements(default_host), "installing the packages"
    tools = ", test tools" if with_tools else ""
    steps(f"Packages: torch 2.11.0 (6 GB on disk), ComfyUI's requirements{tools}")
    if with_tools:
        wanted = [*base, "-r", environment.TEST_REQUIREMENTS]
        environment.install(environment.VENV, "tests", wanted, task, covers={"base": base})
    else:
        environment.install(environment.VENV, "base", base, task)
    return python


def own_host(folder: Path) -> Path:
    """The user's own ComfyUI in that folder; SetupError where there is none."""
    host_dir = folder.expanduser().resolve()
    for name in ("main.py", "requirements.txt"):
        if not (host_dir / name).is_file():
            raise environment.SetupError(f"{host_dir} is not a ComfyUI folder: it has no {name}")
    return host_dir


def choose_host(version: str, folder: Path | None) -> tuple[Path, Path]:
    """The Python and the folder of one host: a version of ours, or a user's own, left untouched."""
    base_python = environment.python_of(environment.VENV)
    default_host = environment.fetch_host(base_python, DEFAULT_HOST)
    if folder is None:
        host_dir, key = environment.fetch_host(base_python, version), version
    else:
        host_dir = own_host(folder)
        key = "own-" + hashlib.sha256(str(host_dir).encode()).hexdigest()[:8]
    texts = [(path / "requirements.txt").read_text().split() for path in (host_dir, default_host)]
    python = base_python if texts[0] == texts[1] else environment.overlay(host_dir, key)
    return python, host_dir


def needs_cpu(python: Path, asked: bool) -> bool:
    """Whether the host must be told to use the CPU: asked for, or torch sees nothing else."""
    if asked:
        return True
    answer = subprocess.run([str(python), "-c", FIND_ACCELERATOR], capture_output=True, text=True)
    return answer.stdout.strip() != "True"
