"""The skip tensors of a U-Net: the first is computed again, others may wait in RAM.

Each input block leaves a map that waits for an output block. The first is made of the latent by one
convolution, and waits longest.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.ops
import torch

from ..base.fetch import is_plain
from ..base.pinned import Pinned, PinnedRam
from ..base.server import NodeLog
from .replaced import eager
from .unet import skip_elements

_FORWARD = inspect.signature(openaimodel.UNetModel.forward)
# They change what the first input block leaves, or may do so in place.
OF_INPUTS = ("input_block_patch", "input_block_patch_after_skip", "forward_timestep_embed_patch")


# Keeps torch.compile out of a function, not out of what it calls.
_untraced = functools.partial(torch.compiler.disable, recursive=False)


class WaitingRam:
    """RAM where the skip tensors of a sampling's calls wait, one call after the other.

    An OUTER_SAMPLE wrapper, `of_sampling`, pins it once and unpins it in the end.
    """

    def __init__(self, log: NodeLog) -> None:
        self._ram = PinnedRam(log)
        self._lent: tuple[torch.device, Pinned] | None = None

    def of_sampling(self, executor, *args, **kwargs):
        """An OUTER_SAMPLE wrapper."""
        device = executor.class_obj.model_patcher.load_device
        if device.type != "cuda":
            return executor(*args, **kwargs)
        with self._ram.of_call(device) as pinned:
            self._lent = device, pinned
            try:
                return executor(*args, **kwargs)
            finally:
                self._lent = None

    def of_call(self, count: int, device: torch.device) -> torch.Tensor:
        """So many bytes, uint8, for a call on the device.

        Not pinned outside of a sampling, where it cannot be, and for the other cards of a sampling:
        their calls run at the same time.
        """
        lent = self._lent
        memory = lent[1](count) if lent is not None and lent[0] == device else None
        return torch.empty(count, dtype=torch.uint8, device="cpu") if memory is None else memory


def make_wrapper(
    on_handover: Callable[[str], None], ram: WaitingRam | None = None
) -> Callable[..., Any]:
    """A DIFFUSION_MODEL wrapper that has the skip tensors wait elsewhere.

    Args:
        on_handover: called with the reason, in a few words, when the first waits as the host's.
        ram: where all but the first wait, and the first if it cannot be computed again; None: on
            the card.
    """

    @_untraced
    def wrapper(executor, *args, **kwargs):
        denoiser = executor.class_obj

        @_untraced
        def innermost(*args, **kwargs):
            bound = _FORWARD.bind(denoiser, *args, **kwargs)
            given = bound.arguments
            options, control = given.get("transformer_options") or {}, given.get("control") or {}
            latent, memory = given["x"], None
            why = _why_first_waits(denoiser, control, options)
            if ram is not None and latent.device.type == "cuda":
                count = latent.shape[0] * skip_elements(
                    denoiser, *latent.shape[2:], with_first=why is not None
                )
                memory = ram.of_call(count * latent.element_size(), latent.device)
            elif why is not None:
                on_handover(why)
                return executor.original(*args, **kwargs)
            again = None if why is not None else denoiser.input_blocks[0][0]
            skips = Skips(latent, again, memory, control)
            given["transformer_options"] = skips.patched(options)
            if "output" in control:  # which the host would add to what stands for the map
                given["control"] = {**control, "output": []}
            return executor.original(*bound.args[1:], **bound.kwargs)

        # Inside of other packs' wrappers, which may change the latent or the options.
        kind = type(executor)
        last = kind.new_class_executor(innermost, denoiser, executor.wrappers, executor.idx)
        return last(*args, **kwargs)

    return wrapper


def _why_first_waits(
    denoiser: Any, control: Mapping[str, Any], options: Mapping[str, Any]
) -> str | None:
    first = denoiser.input_blocks[0]
    if len(first) != 1 or not is_plain(first[0], comfy.ops.disable_weight_init.Conv2d):
        return "another node changed the first block"
    if control.get("input"):
        return "the request has a T2I-Adapter"
    for kind in OF_INPUTS:
        if options.get("patches", {}).get(kind):
            return f"another node patches the input blocks ({kind})"
    return None


class Skips:
    """The skip tensors of one call.

    Args:
        latent: what the first input block is given.
        again: its convolution, if it can be computed again; None: it waits like the others.
        memory: bytes of RAM where the others wait, one after the other; None: on the card. What
            finds no room stays there too.
        control: the request's; its "output" is added to the maps as they come back.

    Memory: on the card the first skip tensor less, from the second input block to the last output
        block; with `memory` all of them.
    Exact: bit-exact.
    """

    def __init__(
        self,
        latent: torch.Tensor,
        again: Any,
        memory: torch.Tensor | None = None,
        control: Mapping[str, Any] | None = None,
    ) -> None:
        self._latent, self._again, self._memory, self._control = latent, again, memory, control
        self._used = 0
        # The map of the block that runs, and where it is going to wait.
        self._passing: torch.Tensor | None = None
        self._room: torch.Tensor | None = None
        # What stands for the first, and what waits in RAM; by their identities.
        self._stand_in: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def patched(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the call, with patches that keep and give the skip tensors.

        What other nodes patch gets the maps themselves, and may write into them.
        """
        patches = dict(options.get("patches", {}))
        before, after, given = (
            patches.get(kind, ())
            for kind in ("input_block_patch", "input_block_patch_after_skip", "output_block_patch")
        )
        patches["input_block_patch"] = [*before, self._keep]
        patches["input_block_patch_after_skip"] = [self._pass, *after, self._leave]
        patches["output_block_patch"] = [self._give, *given]
        return {**options, "patches": patches}

    @eager
    def _keep(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """What waits instead of a block's result, of its shape."""
        if self._again is not None and options["block"] == ("input", 0):
            self._passing = h
            self._stand_in = h.new_zeros(1).expand(h.shape)
            return self._stand_in
        end = self._used + h.nbytes
        if self._memory is None or end > self._memory.nbytes:
            return h
        self._passing = h
        self._room = self._memory[self._used : end].view(h.dtype).view(h.shape)
        self._waiting[id(self._room)] = self._room
        self._used = end
        return self._room

    @eager
    def _pass(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """The result, for the next block."""
        return h if self._passing is None else self._passing

    @eager
    def _leave(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """Copies the result to where it waits, with what patches have written into it."""
        passing, room = self._passing, self._room
        self._passing = self._room = None
        if passing is not None and room is not None:
            # The stream runs one copy after the other, so this one ends before the map's memory,
            # or this memory, is written again.
            room.copy_(passing, non_blocking=room.is_pinned())
        return h

    @eager
    def _give(
        self, h: torch.Tensor, skip: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What waited, for the output block."""
        if self._stand_in is not None and skip is self._stand_in:
            self._stand_in = None
            skip = self._again(self._latent)
        elif self._waiting.pop(id(skip), None) is not None:
            waited = skip
            skip = torch.empty_like(waited, device=h.device)
            skip.copy_(waited, non_blocking=waited.is_pinned())
        return h, openaimodel.apply_control(skip, self._control, "output")
