"""The forward of a decoder or encoder in strips of rows, in place of the host's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...vae.choice import VaeChoice
from ...vae.decode import decode
from ...vae.devices import has_ram, is_unrolled, why_stock
from ...vae.encode import encode
from ...vae.peak import lean_vae_ram_bytes
from ...vae.plan import VaeCall, VaePlan
from ...vae.ram import Ram
from ...vae.steps import step_count
from ..base.pinned import Pinned, PinnedRam
from ..base.reserve import make_room
from ..base.server import NodeLog
from . import layers as vae_layers
from .attempts import Progress, with_attempts

# Pixels below which a progress bar would only flicker, as under each tile of a tiled decode.
_LONG_PX = 768**2


@dataclass(frozen=True)
class VaeSettings:
    """What the node chose.

    choose: the choice for a call on a device. Asked once for all samples and attempts of a call,
        because what is free may change meanwhile.
    budget: bytes that all models and the call may take together; None for no limit.
    """

    choose: Callable[[VaeCall, torch.device], VaeChoice]
    budget: int | None = None


class LeanForward:
    """Runs the host's decoder or encoder in strips, or its own code where strips do not fit."""

    def __init__(self, stock: Any, settings: VaeSettings, log: NodeLog, patcher: Any) -> None:
        self.stock, self._settings, self._log, self._patcher = stock, settings, log, patcher
        self._pinned_ram = PinnedRam(log)

    @property
    def is_decoder(self) -> bool:
        return hasattr(self.stock, "up")

    def __call__(
        self, given: torch.Tensor, output_buffer: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        reason = self._why_not(given, options)
        if reason is not None:
            text = f"ComfyUI's own code runs: {reason}"
            self._log.say_once(text, text)
            made = self.stock(given, **options)
            return made if output_buffer is None else output_buffer.copy_(made)
        if output_buffer is None:
            shape = self.output_shape(given.shape)
            output_buffer = torch.empty(shape, dtype=given.dtype, device=given.device)
        call = self.call(given.shape, given.dtype, given.device)
        choice = self._settings.choose(call, given.device)
        if self._settings.budget is not None:
            taken = choice.need(call) + self._patcher.model_size()
            make_room([self._patcher], taken, self._settings.budget)
        with self._pinned_ram.of_call(given.device) as pinned:
            for index in range(given.shape[0]):
                one = slice(index, index + 1)
                self._run(given[one], output_buffer[one], call, choice, pinned)
        return output_buffer

    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """The shape of the result for samples [B, C, H, W]."""
        factor = vae_layers.sizes(self.stock).factor
        height, width = (
            side * factor if self.is_decoder else side // factor for side in shape[-2:]
        )
        return shape[0], self.stock.conv_out.out_channels, height, width

    def call(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> VaeCall:
        """The call for one of the samples [B, C, H, W] that the module would be given."""
        height, width = (self.output_shape(shape) if self.is_decoder else shape)[-2:]
        sizes, unrolled = vae_layers.sizes(self.stock), is_unrolled(device)
        return VaeCall(sizes, height, width, dtype.itemsize, has_ram(device), unrolled)

    def _why_not(self, given: torch.Tensor, options: dict[str, Any]) -> str | None:
        if options:
            return f"it was called with {', '.join(options)}"
        if given.ndim != 4 or min(self.output_shape(given.shape)[-2:]) < 1:
            return f"a tensor of shape {tuple(given.shape)}"
        tensors = (given, *self.stock.parameters())
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "gradients are on"
        return why_stock(given.device, given.dtype) or vae_layers.why_not(self.stock)

    def _run(
        self,
        sample: torch.Tensor,
        result: torch.Tensor,
        call: VaeCall,
        choice: VaeChoice,
        pinned: Pinned,
    ) -> None:
        run, layers = decode if self.is_decoder else encode, vae_layers.read(self.stock, sample)
        steps = step_count(layers) if call.height * call.width > _LONG_PX else None

        # To another device it is copied once, at the end: the CPU would wait for each strip. The
        # host's tensor may be float32, into which torch converts behind the copy.
        made = result
        if result.device != sample.device:
            made = torch.empty(result.shape, dtype=sample.dtype, device=sample.device)

        def write(first: int, rows: torch.Tensor) -> None:
            made[:, :, first : first + rows.shape[2]].copy_(rows)

        def attempt(plan: VaePlan) -> None:
            ram = Ram(pinned(lean_vae_ram_bytes(call, plan)))
            run(sample, layers, plan, write=write, tick=Progress(steps), ram=ram)
            if made is not result:
                result.copy_(made)

        def say(plan: VaePlan) -> None:
            self._log.say(
                f"out of memory: tried again with strips of {plan.levels[-1].limit} rows, "
                f"prefer {plan.prefer}"
            )

        with_attempts(lambda count: choice.plan(call, count), attempt, say)
