"""Imitates a smaller card: a process of its own holds the rest of the memory.

The card's total stays what it is; only what is free is small, and each row says so. What is left
free is what a process that starts now can have, its CUDA context included, as on a real card.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from pack.nodes.units import GIB

from .job import ALLOCATOR_SETTINGS

_OFF_BYTES = 64 * 2**20  # other programs must not move the free memory by more meanwhile
# The first query makes this process' context, so that it is no longer part of what is free.
_HOLD = """
import sys, torch
wanted, off = int(sys.argv[1]), int(sys.argv[2])
free, _ = torch.cuda.mem_get_info()
if free < wanted:
    sys.exit(f"only {free / 2**30:.2f} GiB are free")
held = torch.empty(free - wanted, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
left, _ = torch.cuda.mem_get_info()
if abs(left - wanted) > off:
    sys.exit(f"{left / 2**30:.2f} GiB are free beside it")
print(held.nbytes, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def ballast(card_gib: float | None) -> Iterator[int]:
    """Leaves so many GiB of the card free while it is open; yields the bytes held.

    Raises:
        RuntimeError: the memory could not be taken, or less than that is free.
    """
    if card_gib is None:
        yield 0
        return
    command = [sys.executable, "-c", _HOLD, str(int(card_gib * GIB)), str(_OFF_BYTES)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # its end is the end of the process, even if we are killed
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # The allocator that the campaign asks for would hold more than it is told to; torch's own
        # takes one allocation of this size as it is, rounded up to 2 MiB.
        env={name: value for name, value in os.environ.items() if name not in ALLOCATOR_SETTINGS},
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        line = process.stdout.readline()
        if not line.strip().isdigit():
            said = process.stderr.read().decode(errors="replace").strip().splitlines() or [""]
            raise RuntimeError(f"a card of {card_gib:g} GiB cannot be imitated: {said[-1]}")
        yield int(line)
    finally:
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
