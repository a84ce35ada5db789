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
    "aiohttp.web", "diffusers", "scipy.integrate", "sqlalchemy.orm", "torch._dynamo", "torchsde",
    "torchvision", "transformers.models.auto",
)  # fmt: skip
LIMIT_S = 300  # of one run
# Not on macOS: there a fork without exec is unsafe once the system's libraries are loaded.
CAN_FORK = sys.platform == "linux"


class WarmPython:
    """A Python that waits with its libraries imported; a context manager.

    Where forks are unsafe each run is a fresh Python instead.

    Args:
        cwd: where the modules are found, and their working directory.
        folder: holds what the last run printed.
        environment: variables of every run.
    """

    def __init__(self, cwd: Path, folder: Path, environment: dict[str, str]) -> None:
        self._cwd, self._folder = cwd, folder
        # Else torch.cuda.is_available() starts CUDA, which a fork cannot use.
        self._environment = {**environment, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

    def __enter__(self) -> WarmPython:
        if CAN_FORK:
            self._process = subprocess.Popen(
                [sys.executable, __file__], cwd=self._cwd, env=self._environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if CAN_FORK:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()

    def run(
        self, module: str, args: Sequence[str], **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs it to its end, as subprocess.run does with captured output.

        Raises:
            RuntimeError: the waiting Python has ended.
        """
        command = [sys.executable, "-m", module, *args]
        if not CAN_FORK:
            return subprocess.run(
                command, cwd=self._cwd, env={**self._environment, **environment},
                capture_output=True, encoding="utf-8", timeout=LIMIT_S,
            )  # fmt: skip
        paths = [self._folder / "stdout", self._folder / "stderr"]
        job = {"argv": [module, *args], "environment": environment, "paths": list(map(str, paths))}
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            print(json.dumps(job), file=self._process.stdin, flush=True)
        code = self._process.stdout.readline()
        if not code:
            raise RuntimeError(f"the waiting Python has ended with {self._process.wait()}")
        texts = (path.read_text(encoding="utf-8") for path in paths)
        return subprocess.CompletedProcess(command, int(code), *texts)


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
        with suppress(ImportError):  # one that is missing costs time only
            importlib.import_module(name)
    job = wait_for_job()
    signal.alarm(LIMIT_S)
    for path, number in zip([os.devnull, *job["paths"]], range(3), strict=True):
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    sys.path[0] = os.getcwd()  # as with -m, not this file's folder
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
