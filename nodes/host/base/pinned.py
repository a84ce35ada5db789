"""Pinned RAM for the maps of a call, by the host's own functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import comfy.model_management as management
import torch
from comfy.cli_args import args

from ...units import MIB
from .server import NodeLog

# A number of bytes to pinned memory of at least so many, uint8; None where none can be had.
Pinned = Callable[[int], "torch.Tensor | None"]
# What stays free beside it; hosts with `ensure_pin_budget` leave as much or more.
_SPARE_BYTES = 2048 * MIB


class PinnedRam:
    """Pins RAM once a call, and no more of it than the maps need; unpins it when the call ends.

    Torch would pin each strip, round it up to a power of two, and keep it until the process ends.
    The host counts this RAM with what it pins itself. With dynamic VRAM it pins weights until
    about 2 GiB are left, so it is asked to unpin some first.

    What could not be pinned once is not asked for again. Then the maps wait in RAM that is not
    pinned, which is slower.
    """

    def __init__(self, log: NodeLog) -> None:
        self._log = log
        self._too_many: int | None = None  # the fewest bytes that could not be pinned

    @contextmanager
    def of_call(self, device: torch.device) -> Iterator[Pinned]:
        """Lends pinned memory to a call on the device: each time the same, until more is wanted."""
        lent: list[torch.Tensor] = []

        def pinned(count: int) -> torch.Tensor | None:
            if not lent or lent[0].nbytes < count:
                _give_back(lent, device)
                lent.extend(self._new(count))
            return lent[0] if lent else None

        try:
            yield pinned
        except BaseException:
            with suppress(RuntimeError):  # the first error says more
                _give_back(lent, device)
            raise
        _give_back(lent, device)

    def _new(self, count: int) -> list[torch.Tensor]:
        is_known_to_fail = self._too_many is not None and count >= self._too_many
        if not count or args.disable_pinned_memory or is_known_to_fail:
            return []
        make_room = getattr(management, "ensure_pin_budget", None)  # not in 0.20.1
        if make_room is not None:
            make_room(count)
        free = management.get_free_memory(torch.device("cpu"))
        if count + _SPARE_BYTES > free:
            self._say(f"{count // MIB} MiB are needed, {free // MIB} MiB of RAM are free")
            return []
        memory = torch.empty(count, dtype=torch.uint8)
        if management.pin_memory(memory):
            return [memory]
        self._too_many = count
        self._say(f"ComfyUI could not pin {count // MIB} MiB")
        return []

    def _say(self, reason: str) -> None:
        line = f"the large feature maps are in RAM that is not pinned, which is slower: {reason}"
        self._log.say_once("not pinned", line)


def _give_back(lent: list[torch.Tensor], device: torch.device) -> None:
    """Unpins the memory, once the device has finished the copies from and to it."""
    if lent:
        memory = lent.pop()
        try:
            torch.cuda.current_stream(device).synchronize()
        finally:
            management.unpin_memory(memory)
