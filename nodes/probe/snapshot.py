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
    """Returns the run whose allocations `log` has as plain dicts and lists."""
    events: list[tuple[int, dict[str, Any]]] = []
    segments = []
    address = 0
    for allocation in log:
        size, frames = allocation.nbytes, _frames(allocation)
        told = {"addr": address, "size": size, "stream": 0, "frames": frames}
        events.append((allocation.born, {"action": "alloc", **told}))
        if allocation.died is None:
            block = {"address": address, "size": size, "requested_size": size,
                     "state": "active_allocated", "frames": frames}  # fmt: skip
            segments.append(
                {"device": 0, "address": address, "total_size": size, "stream": 0,
                 "segment_type": "large", "allocated_size": size, "active_size": size,
                 "requested_size": size, "is_expandable": False, "frames": frames,
                 "blocks": [block]}
            )  # fmt: skip
        else:
            events.append((allocation.died, {"action": "free_requested", **told}))
            events.append((allocation.died, {"action": "free_completed", **told}))
        address += max(size, 1)
    events.sort(key=lambda event: event[0])
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
