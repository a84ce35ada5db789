"""Imitates a smaller card: a process of its own holds the rest of the memory.

The card's total stays what it is; only what is free is small, and each row says so.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

from .job import GIB

_HOLD = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(max(0, free - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print(held.nbytes, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def ballast(card_gib: float | None) -> Iterator[int]:
    """Leaves so many GiB of the card free while it is open; yields the bytes held.

    Raises:
        RuntimeError: the memory could not be taken.
    """
    if card_gib is None:
        yield 0
        return
    left = str(int(card_gib * GIB))
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, left], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise RuntimeError(f"the ballast for a card of {card_gib:g} GiB could not be taken")
        yield int(line)
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        process.wait()
