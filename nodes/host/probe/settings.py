"""What the user asked of one probe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...probe.record import Detail

NODE_ID = "ZImageVRAMProbe"
KEEP = "measure"
RESET = "measure and reset peak"
RESET_ONLY = "reset only"
MODES = [RESET, KEEP, RESET_ONLY]
DETAILS = ["totals", "steps", "blocks", "allocations"]


@dataclass(frozen=True)
class ProbeSettings:
    """The inputs of one probe.

    live: the dict that the node gave to the host as its output. Later records are written into
        it, because the host keeps this very dict for its history.
    """

    label: str
    mode: str
    detail: Detail
    is_kept: bool
    node_id: str | None
    live: dict[str, Any] = field(default_factory=dict)

    @property
    def resets(self) -> bool:
        return self.mode != KEEP

    @property
    def sees_steps(self) -> bool:
        return self.detail != "totals"

    @property
    def sees_blocks(self) -> bool:
        return self.detail in ("blocks", "allocations")
