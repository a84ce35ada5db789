"""Pinned RAM that a call used goes back to the system."""

from __future__ import annotations

import traceback
from contextlib import suppress
from types import TracebackType

import torch


class PinnedRam:
    """What one call pins on its way; given back when the call ends, by an error or cancel too.

    Torch keeps freed pinned blocks for later calls, locked, for as long as the process runs.

    device: where the call computes.
    is_used: to be set by who pins.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.is_used = device, False

    def __enter__(self) -> PinnedRam:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if trace is None:
            self.give_back()
        elif self.is_used:
            traceback.clear_frames(trace)  # their variables hold what was pinned
            with suppress(RuntimeError):  # the error under way says more
                self.give_back()

    def give_back(self) -> None:
        """Gives back what nothing holds any more."""
        if self.is_used:
            empty_cache(self._device)


def empty_cache(device: torch.device) -> None:
    """Frees the pinned RAM that torch holds and nothing uses; only NVIDIA and AMD cards have some.

    Waits for the device: what a copy may still be reading would stay.
    """
    if device.type != "cuda":
        return
    torch.cuda.current_stream(device).synchronize()
    # The public name comes with torch 2.12; before, the private one does the same.
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    empty = empty or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()
