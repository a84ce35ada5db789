"""RAM where strips of a map wait for their next reader."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch


@dataclass
class _Piece:
    """Bytes start to stop of the pinned memory."""

    start: int
    stop: int
    is_free: bool = False


class Ram:
    """Copies strips to RAM and back.

    Strips go to pinned memory while there is room, and are not waited for: their copies keep the
    order of one stream. Others go to RAM that is not pinned, and the CPU waits for each copy.

    Maps are read in the order in which they were stored. So the memory is a ring: a strip takes
    what follows the newest, and the oldest is free first.

    Args:
        pinned: bytes [n], uint8, used on one stream; None where none can be had. They stay pinned
            until the device has finished all copies.

    Memory: `lean_vae_ram_bytes` of it are enough.
    """

    def __init__(self, pinned: torch.Tensor | None = None) -> None:
        self._pinned = torch.empty(0, dtype=torch.uint8) if pinned is None else pinned
        self._pieces: deque[_Piece] = deque()

    def keep(self, rows: torch.Tensor) -> RamStrip:
        """Copies a strip [1, C, n, W] to RAM.

        Memory: the strip once more on its device while it is copied, unless it is channels last.
        """
        # In this format some of the rows of a strip are contiguous too. Torch copies contiguous
        # bytes on the stream. Others it gathers on the CPU first, at once: before they have come.
        rows = rows.contiguous(memory_format=torch.channels_last)
        piece = self._taken(rows.nbytes)
        if piece is None:
            held = torch.empty_like(rows, device="cpu").copy_(rows)
            return RamStrip(self, held, rows.device, None)
        _, channels, count, width = rows.shape
        held = self._pinned[piece.start : piece.stop].view(rows.dtype)
        held = held.view(1, count, width, channels).permute(0, 3, 1, 2)
        held.copy_(rows, non_blocking=True)
        return RamStrip(self, held, rows.device, piece)

    def free(self, piece: _Piece) -> None:
        """Gives the room of a strip to later ones, whose copies come behind its own."""
        piece.is_free = True
        while self._pieces and self._pieces[0].is_free:
            self._pieces.popleft()

    def _taken(self, count: int) -> _Piece | None:
        room = len(self._pinned)
        oldest = self._pieces[0].start if self._pieces else 0
        newest = self._pieces[-1].stop if self._pieces else 0
        if self._pieces and newest <= oldest:  # went on at the beginning
            start = newest if newest + count <= oldest else None
        elif newest + count <= room:
            start = newest
        else:
            start = 0 if count <= oldest else None
        if start is None:
            return None
        self._pieces.append(_Piece(start, start + count))
        return self._pieces[-1]


class RamStrip:
    """A strip that `Ram` keeps; `height` is its number of rows."""

    def __init__(
        self, ram: Ram, rows: torch.Tensor, device: torch.device, piece: _Piece | None
    ) -> None:
        self.height = rows.shape[2]
        self._ram, self._rows, self._device, self._piece = ram, rows, device, piece

    def empty(self, height: int) -> torch.Tensor:
        """A tensor on the device for so many of the map's rows."""
        _, channels, _, width = self._rows.shape
        return torch.empty(
            (1, channels, height, width), dtype=self._rows.dtype, device=self._device,
            memory_format=torch.channels_last,
        )  # fmt: skip

    def copy_to(self, into: torch.Tensor, start: int) -> None:
        """Copies its rows from `start` on to rows of a tensor that `empty` made."""
        rows = self._rows[:, :, start : start + into.shape[2]]
        into.copy_(rows, non_blocking=self._piece is not None)

    def free(self) -> None:
        """Frees it, behind the copies that were asked for."""
        if self._piece is not None:
            self._ram.free(self._piece)
