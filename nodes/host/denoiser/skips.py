"""The skip tensors of a U-Net: the first is computed again where it is used.

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

_FORWARD = inspect.signature(openaimodel.UNetModel.forward)
# They see or change what an input block leaves.
OF_INPUTS = ("input_block_patch", "forward_timestep_embed_patch")


def make_wrapper(on_handover: Callable[[str], None]) -> Callable[..., Any]:
    """A DIFFUSION_MODEL wrapper that has the skip tensors of plain requests wait elsewhere.

    Args:
        on_handover: called with the reason, in a few words, when they wait as the host's.
    """

    def wrapper(executor, *args, **kwargs):
        bound = _FORWARD.bind(executor.class_obj, *args, **kwargs)
        options = bound.arguments.get("transformer_options") or {}
        reason = _why_not(executor.class_obj, bound.arguments, options)
        if reason is not None:
            on_handover(reason)
            return executor(*args, **kwargs)
        skips = Skips(executor.class_obj.input_blocks[0], bound.arguments["x"])
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

    Memory: the first skip tensor less, from the second input block to the last output block.
    Exact: bit-exact.
    """

    def __init__(self, first: Any, latent: torch.Tensor) -> None:
        self._first, self._latent = first, latent
        self._passing: torch.Tensor | None = None
        self._stand_in: torch.Tensor | None = None

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
        if options["block"] != ("input", 0):
            return h
        self._passing = h
        self._stand_in = h.new_zeros(1).expand(h.shape)
        return self._stand_in

    def _pass(self, h: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
        """The result, for the next block."""
        passing, self._passing = self._passing, None
        return h if passing is None else passing

    def _give(
        self, h: torch.Tensor, skip: torch.Tensor, options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What waited, for the output block."""
        if skip is None or skip is not self._stand_in:
            return h, skip
        self._stand_in = None
        return h, self._first[0](self._latent)
