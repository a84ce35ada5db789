"""Returns to the system the pinned RAM that a call used."""

from __future__ import annotations

import traceback
from contextlib import suppress
from types import TracebackType

import torch


class PinnedRam:
    """Frees the pinned RAM of one call when the call ends, also by an error or a cancel.

    Torch itself keeps freed pinned blocks, locked, until the process ends.

    device: where the call computes.
    is_used: set it before RAM is pinned.
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
            traceback.clear_frames(trace)  # their variables hold pinned tensors
            with suppress(RuntimeError):  # the first error says more
                self.give_back()

    def give_back(self) -> None:
        """Frees what no tensor holds any more."""
        if self.is_used:
            empty_cache(self._device)


def empty_cache(device: torch.device) -> None:
    """Frees the pinned RAM that torch holds unused; there is some only with NVIDIA and AMD cards.

    Waits for the device first, because a block that a copy still reads would stay.
    """
    if device.type != "cuda":
        return
    torch.cuda.current_stream(device).synchronize()
    # The public name comes with torch 2.12; before, the private one does the same.
    empty = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    empty = empty or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()
