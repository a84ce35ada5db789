"""Parts that stand in for real ones in the campaign's tests; the leg's name says what to do."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from typing import Any


def run(job: Any, rows: Any) -> None:
    rows.facts["device"] = "none"
    rows.write("64x64x1", "before", step_s=0.5)
    name = job.leg.name
    if name == "raises":
        raise ValueError(f"{job.host_dir}/deep/inside.py is broken\nand a second line")
    if name == "variant raises":
        with rows.attempt("64x64x1", "bad", 0) as figures:
            figures |= {"kept": 1, "note": "its own"}
            for _ in range(2):
                logging.getLogger("pack.nodes.host").info("a node says so")
                logging.getLogger("comfy").info("the host chats")
                logging.getLogger("comfy").warning("the host warns")
            raise ValueError("it cannot be")
    if name == "runs out":
        with rows.attempt("64x64x1", "bad", 0):
            raise RuntimeError("CUDA error: out of memory")
    if name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hangs":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(job.folder)])
        time.sleep(60)
    if name == "is resumed" and not rows.has("64x64x1", "second"):
        rows.write("64x64x1", "second")
        raise RuntimeError("the first try fails")
    rows.write("64x64x1", "after", step_s=0.25)
