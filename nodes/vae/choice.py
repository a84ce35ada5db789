"""The plan, the arithmetic and the need of each call of a VAE with one preference."""

from __future__ import annotations

from typing import Any, NamedTuple

from .need import vae_need_bytes
from .peak import lean_vae_peak_bytes, lean_vae_work, stock_vae_peak_bytes
from .plan import Prefer, VaePlan, VaeSizes, is_fused_in, vae_plan

MIB = 2**20


class VaeChoice(NamedTuple):
    """What was chosen; answers what a call needs.

    A call has `sizes` (by the names of `VaeSizes`), `height` and `width` of the picture in pixels,
    and the `dtype` and `device` of the arithmetic.
    """

    prefer: Prefer
    strip_rows: int

    def plan(self, call: Any, attempt: int = 0) -> VaePlan | None:
        """What to store for the call, after so many that ran out of memory."""
        return vae_plan(
            VaeSizes(**call.sizes),
            call.height,
            call.width,
            prefer=self.prefer,
            strip_rows=self.strip_rows,
            has_ram=call.device.type == "cuda",
            is_fused=is_fused_in(call.dtype.itemsize),
            attempt=attempt,
        )

    def work(self, call: Any, plan: VaePlan) -> int:
        """Multiply-adds of the call."""
        return lean_vae_work(VaeSizes(**call.sizes), call.height, call.width, plan)

    def need(self, call: Any) -> int:
        """Bytes that the host shall reckon with."""
        return vae_need_bytes(self._peak_bytes(call))

    def report(self, call: Any) -> str:
        """What is won for a decode of that size and of twice its sides, in one line."""
        parts = []
        for scale in (1, 2):
            here = call._replace(height=scale * call.height, width=scale * call.width)
            stock = stock_vae_peak_bytes(
                VaeSizes(**here.sizes), here.height, here.width, here.dtype.itemsize
            )
            parts.append(
                f"{stock / MIB:.0f} -> {self._peak_bytes(here) / MIB:.0f} MiB predicted at "
                f"{here.width}x{here.height}"
            )
        return f"decode {' · '.join(parts)}, exact"

    def _peak_bytes(self, call: Any) -> int:
        sizes = VaeSizes(**call.sizes)
        plan = self.plan(call)
        assert plan is not None  # the first attempt has a plan
        return lean_vae_peak_bytes(sizes, call.height, call.width, call.dtype.itemsize, plan)
