"""What a preference makes of one decode or encode: the plan, the bytes to reserve."""

from __future__ import annotations

from typing import NamedTuple

from ..units import MIB
from .need import vae_need_bytes
from .peak import lean_vae_peak_bytes, stock_vae_peak_bytes
from .plan import Prefer, VaeCall, VaePlan, vae_plan


class VaeChoice(NamedTuple):
    """What the user chose: see `vae_plan`."""

    prefer: Prefer
    strip_rows: int

    def plan(self, call: VaeCall, attempt: int = 0) -> VaePlan | None:
        """The plan for a call after `attempt` plans ran out of memory; None: no smaller one."""
        return vae_plan(call, prefer=self.prefer, strip_rows=self.strip_rows, attempt=attempt)

    def need(self, call: VaeCall) -> int:
        """Bytes to reserve for the call, weights excluded."""
        return vae_need_bytes(self._peak_bytes(call))

    def report(self, call: VaeCall) -> str:
        """One line: the peak without and with Lean VAE, for this size and for twice its sides."""
        parts = []
        for scale in (1, 2):
            here = call._replace(height=scale * call.height, width=scale * call.width)
            stock = stock_vae_peak_bytes(here)
            parts.append(
                f"{stock / MIB:.0f} -> {self._peak_bytes(here) / MIB:.0f} MiB predicted at "
                f"{here.width}x{here.height}"
            )
        return f"decode {' · '.join(parts)}"

    def _peak_bytes(self, call: VaeCall) -> int:
        plan = self.plan(call)
        assert plan is not None  # the first attempt has a plan
        return lean_vae_peak_bytes(call, plan)
