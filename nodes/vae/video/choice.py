"""What a preference makes of a video's decode or encode: the plan, the bytes to reserve."""

from __future__ import annotations

from typing import NamedTuple

from ...prefer import Prefer
from ...units import MIB
from ..need import vae_need_bytes
from .peak import video_peak_bytes
from .plan import video_plan
from .sizes import VideoCall, VideoPlan


class VideoChoice(NamedTuple):
    """What the user chose: see `video_plan`."""

    prefer: Prefer
    strip_rows: int

    def plan(self, call: VideoCall, attempt: int = 0) -> VideoPlan | None:
        """The plan for a call after `attempt` plans ran out of memory; None: no smaller one."""
        return video_plan(call, prefer=self.prefer, strip_rows=self.strip_rows, attempt=attempt)

    def need(self, call: VideoCall) -> int:
        """Bytes to reserve for the call, weights and the result excluded."""
        return vae_need_bytes(self._peak_bytes(call))

    def report(self, call: VideoCall) -> str:
        """One line: the peak for this size and for twice its sides."""
        parts = []
        for scale in (1, 2):
            here = call._replace(height=scale * call.height, width=scale * call.width)
            size = f"{here.width}x{here.height}"
            parts.append(f"{self._peak_bytes(here) / MIB:.0f} MiB predicted at {size}")
        return f"decode {' · '.join(parts)}"

    def _peak_bytes(self, call: VideoCall) -> int:
        plan = self.plan(call)
        assert plan is not None  # the first attempt has a plan
        return video_peak_bytes(call, plan)
