"""What the node file hands to this room: the records and counters of the memory room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

NODE_ID = "ZImageVRAMProbe"
KEEP = "measure"
SET_BACK = "measure and reset peak"
RESET_ONLY = "reset only"
MODES = [SET_BACK, KEEP, RESET_ONLY]
DETAILS = ["totals", "steps", "blocks", "allocations"]


class Tools(Protocol):
    """Classes and functions of the memory room; this room does not import them."""

    record: Callable[..., Any]
    device: Callable[..., Any]
    figure: Callable[..., Any]
    tensor: Callable[..., Any]
    recorder: Callable[..., Any]
    pace: Callable[..., Any]
    parts_of: Callable[[int, int, int], Any]
    counter: Callable[..., Any]
    count: Callable[[int, int], Any]
    tracker: Callable[..., Any]
    completed: Callable[..., Any]
    missed: Callable[[str], Any]
    row: Callable[..., dict[str, Any]]
    append: Callable[..., None]
    write_snapshot: Callable[[Any, Any], None]
    workflow_hash: Callable[[Any], str]


@dataclass(frozen=True)
class ProbeSettings:
    """What the user asked of one probe.

    live: what the node has shown as its output; a later record is written into it, so that the
        host's history, which keeps this very object, has the last one.
    """

    tools: Tools
    label: str
    mode: str
    detail: str
    is_kept: bool
    node_id: str | None
    live: dict[str, Any] = field(default_factory=dict)

    @property
    def sets_back(self) -> bool:
        return self.mode != KEEP

    @property
    def sees_steps(self) -> bool:
        return self.detail != "totals"

    @property
    def sees_blocks(self) -> bool:
        return self.detail in ("blocks", "allocations")
