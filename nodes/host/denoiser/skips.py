"""The skip tensors of a U-Net: the first is computed again, others may wait in RAM.

Each input block leaves a map that waits for an output block. The first is made of the latent by one
convolution, and waits longest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.ops
import torch

from ..base.fetch import is_plain
from ..base.pinned import PinnedRam
from ..base.server import NodeLog
from .unet_parts import skip_elements

_FORWARD = inspect.signature(openaimodel.UNetModel.forward)
# They see or change what an input block leaves.
OF_INPUTS = ("input_block_patch", "forward_timestep_embed_patch")


class WaitingRam:
    """RAM where the skip tensors of a sampling's calls wait, one call after the other.

    An OUTER_SAMPLE wrapper, `of_sampling`, pins it once and unpins it in the end.
    """

    def __init__(self, log: NodeLog) -> None:
        self._ram, self._pinned = PinnedRam(log), None

    def of_sampling(self, executor, *args, **kwargs):
        """An OUTER_SAMPLE wrapper."""
        device = executor.class_obj.model_patcher.load_device
        if device.type != "cuda":
            return executor(*args, **kwargs)
        with self._ram.of_call(device) as self._pinned:
            try:
                return executor(*args, **kwargs)
            finally:
                self._pinned = None

    def of_call(self, count: int) -> torch.Tensor:
        """So many bytes, uint8; not pinned outside of a sampling, or where it cannot be."""
        memory = None if self._pinned is None else self._pinned(count)
        return torch.empty(count, dtype=torch.uint8, device="cpu") if memory is None else memory


def make_wrapper(
    on_handover: Callable[[str], None], ram: WaitingRam | None = None
) -> Callable[..., Any]:
    """A DIFFUSION_MODEL wrapper that has the skip tensors of plain requests wait elsewhere.

    Args:
        on_handover: called with the reason, in a few words, when they wait as the host's.
        ram: where all but the first wait; None: on the card.
    """

    def wrapper(executor, *args, **kwargs):
        denoiser = executor.class_obj
        bound = _FORWARD.bind(denoiser, *args, **kwargs)
        options = bound.arguments.get("transformer_options") or {}
        reason = _why_not(denoiser, bound.arguments, options)
        if reason is not None:
            on_handover(reason)
            return executor(*args, **kwargs)
        latent, memory = bound.arguments["x"], None
        if ram is not None and latent.device.type == "cuda":
            count = latent.shape[0] * skip_elements(denoiser, *latent.shape[2:])
            memory = ram.of_call(count * latent.element_size())
        skips = Skips(denoiser.input_blocks[0], latent, memory)
        bound.arguments["transformer_options"] = skips.patched(options)
        return executor(*bound.args[1:], **bound.kwargs)

    return wrapper


def _why_not(denoiser: Any, given: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    first = denoiser.input_blocks[0]
    if len(first) != 1 or not is_plain(first[0], comfy.ops.disable_weight_init.Conv2d):
        return "another node changed the first block"
    if given.get("control") is not None:  # the host adds it to the skip tensors, in place
        return "the request has a ControlNet"
    for kind in OF_INPUTS:
        if options.get("patches", {}).get(kind):
            return f"another node patches the input blocks ({kind})"
    return None


class Skips:
    """The skip tensors of one call.

    Args:
        first: the first input block.
        latent: what it is given.
        memory: bytes of RAM where the others wait, one after the other; None: on the card. What
            finds no room stays there too.

    Memory: on the card the first skip tensor less, from the second input block to the last output
        block; with `memory` all of them.
    Exact: bit-exact.
    """

    def __init__(
        self, first: Any, latent: torch.Tensor, memory: torch.Tensor | None = None
    ) -> None:
        self._first, self._latent, self._memory = first, latent, memory
        self._used = 0
        self._passing: torch.Tensor | None = None
        # What stands for the first, and what waits in RAM; by their identities.
        self._stand_in: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def patched(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the call, with patches that keep and give the skip tensors.

        What other nodes patch gets the maps themselves.
        """
        patches = dict(options.get("patches", {}))
        ours = {
            "input_block_patch": self._keep,
            "input_block_patch_after_skip": self._pass,
            "output_block_patch": self._give,
        }
        for kind, patch in ours.items():
            patches[kind] = [patch, *patches.get(kind, ())]
        return {**options, "patches": patches}

    def _keep(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """What waits instead of a block's result, of its shape."""
        if options["block"] == ("input", 0):
            self._passing = h
            self._stand_in = h.new_zeros(1).expand(h.shape)
            return self._stand_in
        waiting = self._in_ram(h)
        if waiting is None:
            return h
        self._passing = h
        self._waiting[id(waiting)] = waiting
        return waiting

    def _in_ram(self, h: torch.Tensor) -> torch.Tensor | None:
        end = self._used + h.nbytes
        if self._memory is None or end > self._memory.nbytes:
            return None
        waiting = self._memory[self._used : end].view(h.dtype).view(h.shape)
        self._used = end
        # The stream runs one copy after the other, so this one ends before the map's memory, or
        # this memory, is written again.
        return waiting.copy_(h, non_blocking=self._memory.is_pinned())

    def _pass(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """The result, for the next block."""
        passing, self._passing = self._passing, None
        return h if passing is None else passing

    def _give(
        self, h: torch.Tensor, skip: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What waited, for the output block."""
        if skip is not None and skip is self._stand_in:
            self._stand_in = None
            return h, self._first[0](self._latent)
        if self._waiting.pop(id(skip), None) is None:
            return h, skip
        given = torch.empty_like(skip, device=h.device)
        return h, given.copy_(skip, non_blocking=skip.is_pinned())
