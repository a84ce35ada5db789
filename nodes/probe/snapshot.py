"""A tracked run in the format of torch's memory viewer, on any device and with any allocator.

It has the form that `torch.cuda.memory._dump_snapshot` pickles, which needs a CUDA device with
torch's native allocator: every allocation and free in order, and what is alive at the end.
Addresses are made up. Each is used once, so that the viewer tells the allocations apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tracker import Allocation


def snapshot(log: Sequence[Allocation]) -> dict[str, Any]:
    """Returns the run as plain dicts and lists.

    Args:
        log: every allocation, with the ticks of its beginning and its end.
    """
    events: list[tuple[int, dict[str, Any]]] = []
    blocks = []
    address = 0
    for allocation in log:
        size = allocation.nbytes
        told = {"addr": address, "size": size, "stream": 0, "frames": _frames(allocation)}
        events.append((allocation.born, {"action": "alloc", **told}))
        if allocation.died is None:
            blocks.append(
                {"address": address, "size": size, "requested_size": size,
                 "state": "active_allocated", "frames": told["frames"]}
            )  # fmt: skip
        else:
            events.append((allocation.died, {"action": "free_requested", **told}))
            events.append((allocation.died, {"action": "free_completed", **told}))
        address += max(size, 1)
    events.sort(key=lambda event: event[0])
    segments = [
        {"device": 0, "address": block["address"], "total_size": block["size"], "stream": 0,
         "segment_type": "large", "allocated_size": block["size"], "active_size": block["size"],
         "requested_size": block["size"], "is_expandable": False, "frames": block["frames"],
         "blocks": [block]}
        for block in blocks
    ]  # fmt: skip
    return {
        "segments": segments,
        "device_traces": [[event for _, event in events]],
        "allocator_settings": {},
        "external_annotations": [],
    }


def _frames(allocation: Allocation) -> list[dict[str, Any]]:
    """The operation, and the code line that called it; the innermost first."""
    frames = [{"name": allocation.op, "filename": "", "line": 0}]
    place, _, function = allocation.where.partition(" ")
    file, _, line = place.rpartition(":")
    if line.isdigit():
        frames.append({"name": function, "filename": file, "line": int(line)})
    return frames
