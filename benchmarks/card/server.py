"""The host's real server for a part that measures it from outside, in a process without a context.

The server runs as users have it: nothing is forced, neither on its command line nor by the
environment that the campaign makes for its own processes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pack.runner.live_host import REPO, HostError, LiveHost

from .driver import used_bytes
from .host import torch_facts
from .job import ALLOCATOR_SETTINGS, Job
from .rows import NOT_MEASURED, OUT_OF_MEMORY, without_paths

START_TIMEOUT_S = 120.0
_DYNAMIC = "DynamicVRAM support detected and enabled"
# What comfy/ldm/modules/attention.py says at its import, and the function that it then takes.
_ATTENTION = {
    "Using sage attention": "attention_sage",
    "Using Flash Attention": "attention_flash",
    "Using xformers attention": "attention_xformers",
    "Using pytorch attention": "attention_pytorch",
    "Using split optimization for attention": "attention_split",
    "Using sub quadratic optimization for attention": "attention_sub_quad",
}
_NO_WORDS = re.compile(r"^\s*$|it/s|s/it")  # progress bars, and what lies between them
_DTYPE = re.compile(r"model weight dtype torch\.(\w+), manual cast: (?:torch\.)?(\w+)")
_ALLOCATOR = re.compile(r"Device: cuda\S* .* : (\w+)\s*$", re.MULTILINE)
_TORCH_FACTS = (
    "import json, torch; from benchmarks.card.host import torch_facts; "
    "print(json.dumps(torch_facts(torch.device('cuda'))))"
)


class RunLimitError(HostError):
    """Our own limit ended the server, so the run says nothing of the host or the card."""


def free_environment() -> None:
    """Makes the environment of this process one as users have it; its children inherit that."""
    for name in ALLOCATOR_SETTINGS:  # main.py and torch choose the allocator
        os.environ.pop(name, None)
    # LiveHost gives one thread, for tests; torch itself takes all.
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))


def machine_facts(job: Job) -> dict[str, Any]:
    """`host.facts` before a server runs: what only the server can tell is None.

    Raises:
        RuntimeError: torch cannot use the card.
    """
    unknown = dict.fromkeys(
        ("allocator", "mode", "attention", "dtype", "comfyui", "comfy_aimdo", "comfy_kitchen")
    )
    if job.is_rehearsal:
        return {**torch_facts(torch.device("cpu")), **unknown}
    # In a process of its own: a context of ours would count as the server's memory.
    asked = subprocess.run(
        [sys.executable, "-c", _TORCH_FACTS], cwd=REPO, capture_output=True, encoding="utf-8"
    )
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RuntimeError(f"torch cannot use the card: {last}")
    return {**json.loads(asked.stdout.splitlines()[-1]), **unknown}


def server_facts(server: LiveHost) -> dict[str, Any]:
    """The rest of `host.facts` but the dtype, as the server tells it; None for what it does not."""
    system, log = server.get_json("/system_stats")["system"], server.log()
    versions = {p["name"]: p["installed"] for p in system.get("comfy_package_versions", ())}
    allocator = _ALLOCATOR.search(log)
    return {
        "allocator": allocator and allocator[1],
        "mode": "dynamic VRAM" if _DYNAMIC in log else "loading by estimate",
        "attention": next((name for said, name in _ATTENTION.items() if said in log), None),
        "comfyui": system["comfyui_version"],
        "comfy_aimdo": versions.get("comfy-aimdo"),
        "comfy_kitchen": versions.get("comfy-kitchen"),
    }


def dtype_of(log: str) -> str | None:
    """In what the transformer computes; None before it was loaded."""
    found = _DTYPE.search(log)
    return found and (found[1] if found[2] == "None" else found[2])


@contextlib.contextmanager
def running(job: Job, base_dir: Path, paths_file: Path) -> Iterator[LiveHost]:
    """A fresh server while it is open, with the pack; its log stays in `base_dir`.

    Args:
        job: on the CPU and with small models in a rehearsal.
        base_dir: what the server writes lies below it.
        paths_file: where its models are.

    Raises:
        HostError: it did not start.
    """
    custom = base_dir / "custom_nodes"
    custom.mkdir(parents=True, exist_ok=True)
    if job.is_rehearsal:
        shutil.copy(REPO / "testing" / "widen_detection.py", custom)
    more: list[str] = []
    if importlib.util.find_spec("comfyui_frontend_package") is None:
        page = base_dir / "page"  # the host ends without one; an empty one will do
        page.mkdir(exist_ok=True)
        more = ["--front-end-root", str(page)]
    server = LiveHost(
        job.host_dir, base_dir, cpu=job.is_rehearsal, args=more, extra_model_paths=paths_file,
        start_timeout_s=START_TIMEOUT_S,
    )  # fmt: skip
    try:
        with server:
            yield server
    finally:
        _clear(base_dir)


@contextlib.contextmanager
def time_limit(server: LiveHost, seconds: float) -> Iterator[None]:
    """Ends the server after so many seconds, so that what waits for it goes on.

    Raises:
        RunLimitError: it was ended; its process is gone.
    """
    late = threading.Event()

    def end() -> None:
        late.set()
        server.stop()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        if not late.is_set():
            raise
    finally:
        timer.cancel()
        timer.join()  # a server that ends still holds the card, and the next one is measured
    if late.is_set():
        raise RunLimitError(f"{NOT_MEASURED}: the run took longer than {seconds:.0f} s")


def resting_bytes(*, limit_s: float = 5.0) -> int | None:
    """What is in use of the card once an ended process has given back what it had."""
    before, end = used_bytes(), time.monotonic() + limit_s
    while before is not None and time.monotonic() < end:
        time.sleep(0.3)
        now = used_bytes()
        if now is None or abs(now - before) < 2**20:
            return now
        before = now
    return before


def sentence(error: HostError) -> str:
    """What a row says of a run that the server did not bring to its end."""
    status = (error.history or {}).get("status", {})
    for kind, details in status.get("messages", ()):
        if kind == "execution_error" and (
            details["exception_type"].endswith("OutOfMemoryError")
            or "ran out of memory on your GPU" in details["exception_message"]
        ):
            return f"{OUT_OF_MEMORY} in {details['node_type']}"
    first, *more = (line for line in str(error).strip().splitlines() if not _NO_WORDS.search(line))
    if first.endswith("its log:") and more:  # LiveHost gives the last lines of it
        return without_paths(f"{first.removesuffix('; its log:')}: {more[-1]}")
    return without_paths(first)


def _clear(base_dir: Path) -> None:
    """Removes what the host wrote: pictures, temporary files."""
    for name in ("output", "temp", "input"):
        shutil.rmtree(base_dir / name, ignore_errors=True)
