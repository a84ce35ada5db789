"""Runs modules as `python -m` does, each in a fork of one Python that has imported the libraries.

A fresh Python takes five to eight seconds of a core to import torch and what ComfyUI asks for.
ComfyUI and this project are imported after the fork, by each run in its own order.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LIBRARIES = (
    "aiohttp.web", "comfy_kitchen", "diffusers", "scipy.integrate", "sqlalchemy.orm",
    "torch._dynamo", "torchsde", "torchvision", "transformers.models.auto",
)  # fmt: skip


class WarmPython:
    """A Python that waits with its libraries imported; a context manager.

    Args:
        cwd: where the modules are found, and their working directory.
        folder: gets what they print.
        environment: of all of them.
    """

    def __init__(self, cwd: Path, folder: Path, environment: dict[str, str]) -> None:
        self._cwd, self._folder, self._environment = cwd, folder, environment

    def __enter__(self) -> WarmPython:
        if hasattr(os, "fork"):
            self._process = subprocess.Popen(
                [sys.executable, __file__], cwd=self._cwd, env=self._environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if not hasattr(os, "fork"):
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def run(
        self, module: str, args: Sequence[str], **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end, as subprocess.run does with captured output."""
        command = [sys.executable, "-m", module, *args]
        if not hasattr(os, "fork"):  # Windows
            return subprocess.run(
                command, cwd=self._cwd, env={**self._environment, **environment},
                capture_output=True, encoding="utf-8",
            )  # fmt: skip
        paths = [self._folder / "stdout", self._folder / "stderr"]
        job = {"argv": [module, *args], "environment": environment, "paths": list(map(str, paths))}
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(p.read_text("utf-8") for p in paths))


def wait_for_job() -> dict[str, Any]:
    """Forks for each line of the standard input; returns in the fork, with what the line says."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    job = wait_for_job()
    for path, number in zip([os.devnull, *job["paths"]], range(3), strict=True):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    sys.path[0] = os.getcwd()  # as with -m, not this file's folder
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
