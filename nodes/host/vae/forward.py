"""A decoder's or encoder's forward in strips of rows, in the place of the host's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import comfy.model_management
import comfy.utils
import torch
from torch import nn

from ..base import server
from ..base.reserve import make_room
from . import layers as vae_layers
from .pinned import PinnedRam

logger = logging.getLogger(__name__)

# Multiply-adds below which a progress bar would only flicker, as under each tile of a tiled decode.
_LONG = 2 * 10**12


class Call(NamedTuple):
    """One sample that is to be decoded or encoded.

    sizes: of the module, by the names of memory's VaeSizes.
    height: of the picture, in pixels.
    width: likewise.
    dtype: of the arithmetic.
    device: where to compute.
    """

    sizes: dict[str, Any]
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device


class Choice(Protocol):
    """What was chosen for a call; memory's VaeChoice."""

    def plan(self, call: Call, attempt: int, /) -> Any:
        """After so many attempts that ran out of memory; None if there is no smaller."""
        ...

    def work(self, call: Call, plan: Any, /) -> int:
        """Multiply-adds of a plan."""
        ...

    def need(self, call: Call, /) -> int:
        """Bytes that the host shall reckon with."""
        ...


@dataclass(frozen=True)
class VaeSettings:
    """What the node hands in from the other rooms.

    kernels: the kernels by name: decode, encode and the layer classes.
    choose: the choice for a call; asked once for all its samples and attempts, because what is
        free meanwhile may change it.
    budget: bytes that all models and the need may take together; None for no limit.
    """

    kernels: Any
    choose: Callable[[Call], Choice]
    budget: int | None = None


class LeanForward:
    """The forward of a decoder or encoder, in strips; the host's own where they do not fit."""

    def __init__(
        self, stock: nn.Module, settings: VaeSettings, node_id: str | None, patcher: Any
    ) -> None:
        self.stock, self._settings, self._node_id = stock, settings, node_id
        self._patcher = patcher
        self._said: set[str] = set()

    @property
    def is_decoder(self) -> bool:
        return hasattr(self.stock, "up")

    def __call__(
        self, given: torch.Tensor, output_buffer: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        reason = self._why_not(given, options)
        if reason is not None:
            self._say_once(f"the host's own code runs: {reason}")
            made = self.stock(given, **options)
            return made if output_buffer is None else output_buffer.copy_(made)
        if output_buffer is None:
            shape = self.output_shape(given.shape)
            output_buffer = torch.empty(shape, dtype=given.dtype, device=given.device)
        call = self.call(given.shape, given.dtype, given.device)
        choice = self._settings.choose(call)
        if self._settings.budget is not None:
            taken = choice.need(call) + self._patcher.model_size()
            make_room([self._patcher], taken, self._settings.budget)
        with PinnedRam(given.device) as ram:
            for index in range(given.shape[0]):
                one = slice(index, index + 1)
                self._run(given[one], output_buffer[one], call, choice, ram)
        return output_buffer

    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """The shape of the result for samples [B, C, H, W]."""
        height, width = shape[-2:]
        for _ in range(len(self.sizes()["widths"]) - 1):
            height, width = (
                (2 * side if self.is_decoder else side // 2) for side in (height, width)
            )
        return shape[0], self.stock.conv_out.out_channels, height, width

    def sizes(self) -> dict[str, Any]:
        """The module's sizes, by the names of memory's VaeSizes."""
        return vae_layers.sizes(self.stock)

    def call(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call:
        """One sample of samples [B, C, H, W] of the module's input."""
        if self.is_decoder:
            shape = torch.Size(self.output_shape(shape))
        return Call(self.sizes(), shape[-2], shape[-1], dtype, device)

    def _why_not(self, given: torch.Tensor, options: dict[str, Any]) -> str | None:
        if options:
            return f"it was called with {', '.join(options)}"
        if given.ndim != 4 or min(self.output_shape(given.shape)[-2:]) < 1:
            return f"a tensor of shape {tuple(given.shape)}"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.stock.parameters()):
            return "gradients are wanted"
        return vae_layers.why_not(self.stock)

    def _run(
        self,
        sample: torch.Tensor,
        result: torch.Tensor,
        call: Call,
        choice: Choice,
        ram: PinnedRam,
    ) -> None:
        plan = choice.plan(call, 0)
        for attempt in itertools.count(1):
            following = choice.plan(call, attempt)
            ram.is_used |= any(level.in_ram for level in plan.levels)
            try:
                self._strips(sample, result, plan, choice.work(call, plan))
                return
            except Exception as error:
                if following is None or not _is_oom(error):
                    raise
            # Out of the except block, because the error holds every tensor of the attempt.
            comfy.model_management.soft_empty_cache(True)
            ram.give_back()  # the next strips have another size
            plan = following
            _say(
                self._node_id,
                f"out of memory: tried again with strips of {plan.levels[-1].limit} rows, "
                f"prefer {plan.prefer}",
            )

    def _strips(self, sample: torch.Tensor, result: torch.Tensor, plan: Any, work: int) -> None:
        kernels = self._settings.kernels
        layers = vae_layers.read(self.stock, kernels, sample)

        def write(first: int, rows: torch.Tensor) -> None:
            result[:, :, first : first + rows.shape[2]].copy_(rows)

        run = kernels.decode if self.is_decoder else kernels.encode
        tick = _Progress(work)
        run(sample, layers, plan, device=sample.device, write=write, tick=tick)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _say(self._node_id, text)


def _say(node_id: str | None, text: str) -> None:
    logger.info("Lean VAE: %s", text)
    server.show_text(node_id, text)


class _Progress:
    """Moves the running node's bar on long work, and ends it when the user cancels."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._percent = total, 0, 0
        self._bar = comfy.utils.ProgressBar(100) if total > _LONG else None

    def __call__(self, work: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += work
        percent = min(100, 100 * self._done // self._total)
        if self._bar is not None and percent > self._percent:
            self._percent = percent
            self._bar.update_absolute(percent)


def _is_oom(error: Exception) -> bool:
    # Hosts before 0.20 name only the exception.
    is_oom = getattr(comfy.model_management, "is_oom", None)
    if is_oom is not None:
        return is_oom(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
