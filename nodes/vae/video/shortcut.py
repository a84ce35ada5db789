"""A path around several layers of a causal video VAE, fed frame by frame as they are.

What it needs of a frame is taken before those layers run, and added to what they make of it. The
layers need rows below for each of theirs, the path does not. So its rows come first, and wait: for
the layers in this strip, or for the strip below.
"""

from __future__ import annotations

import torch

from ..strips import add_rows_, inner
from .resample import every_second
from .sizes import Shortcut
from .step import Edges, Step


class Path:
    """The path of one shortcut, from its `Fork` to its `Join`.

    Memory: the rows of a frame, or a quarter of them where it gives means, until the layers are
        done with it; and of all frames the rows that wait for the strip below.
    Exact: bit for bit as the host's AvgDown3D and DupUp3D, whose mean it repeats.
    """

    def __init__(self, shortcut: Shortcut) -> None:
        self._shortcut = shortcut
        self._above: dict[int, torch.Tensor] = {}  # of each frame
        self._odd: dict[int, torch.Tensor] = {}  # a row whose partner comes with the strip below
        self._waiting: dict[int, list[torch.Tensor]] = {}

    def begin(self, edges: Edges) -> None:
        """Begins a strip; the edges are of the maps of all layers."""
        self._begun, self._stops = ((rows[0], rows[-1]) for rows in edges)
        self._given, self._made = -1, -1
        self._waiting.clear()

    def take(self, rows: torch.Tensor) -> None:
        """Takes a frame's new rows, [1, C, n, W], and keeps what is to be added to the result."""
        self._given += 1
        frame = self._given
        parts = self._means(frame, rows) if self._shortcut.way == "down" else [rows]
        if frame in self._above:
            parts.insert(0, self._above.pop(frame))
        count = self._shortcut.waiting_rows(*self._stops)
        if count > 0:
            last = parts[-1] if parts[-1].shape[2] >= count else torch.cat(parts, 2)
            self._above[frame] = last[:, :, last.shape[2] - count :].clone()
        self._waiting[frame] = parts

    def add_to(self, rows: torch.Tensor) -> torch.Tensor:
        """Adds what was taken to the rows of the next frame that the layers made, in place."""
        self._made += 1
        number, way, frames = self._made, self._shortcut.way, self._shortcut.frames
        if way == "up":
            # The host drops what comes before the first frame's last.
            frame, part = divmod(number + frames - 1, frames)
            is_last = part == frames - 1
            parts = self._waiting.pop(frame) if is_last else self._waiting[frame].copy()
            self._repeat(parts, rows, part)
            return rows
        if frames > 1 and number == 0:
            rows = rows.clone()  # the layer before reads this frame again
        for part in range(frames):
            # The host puts a frame of zeros before the first.
            parts = self._waiting.pop(number * frames + part - frames + 1, [])
            add_rows_(rows[:, part::frames], inner(parts, 0, rows.shape[2]))
        return rows

    def _means(self, frame: int, rows: torch.Tensor) -> list[torch.Tensor]:
        """The means of the squares of four; of an odd number of rows the last one waits."""
        found = []
        if frame in self._odd and rows.shape[2]:
            pair = torch.cat((self._odd.pop(frame), rows[:, :, :1]), 2)
            found, rows = [_mean(pair)], rows[:, :, 1:]
        even = rows.shape[2] // 2 * 2
        if even < rows.shape[2]:
            self._odd[frame] = rows[:, :, even:].clone()
        if even or not found:
            found.append(_mean(rows[:, :, :even]))
        return found

    def _repeat(self, parts: list[torch.Tensor], rows: torch.Tensor, part: int) -> None:
        """Adds each row to two, each of its elements to two."""
        _, given, made, _, frames = self._shortcut[1:]
        times = made * frames * 4 // given  # so often the host repeats a channel
        top = self._begun[1]
        source = top // 2
        while parts:
            for row in (0, 1):
                channel = (4 * part + 2 * row) // times
                chosen = parts[0][:, channel :: given // made]
                into, doubled = every_second(chosen, 2 * source + row - top, rows)
                into.add_(doubled)
            source += parts.pop(0).shape[2]


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """The means of 2 x 2 elements.

    Memory: the rows once more, in the host's order for its sum.
    """
    _, channels, count, width = rows.shape
    squares = rows.unflatten(3, (width // 2, 2)).unflatten(2, (count // 2, 2))
    squares = squares.permute(0, 1, 3, 5, 2, 4).contiguous()
    return squares.view(1, channels, 4, count // 2, width // 2).mean(2)


class Fork(Step):
    """Where a path leaves the layers."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, edges: Edges) -> None:
        self._path.begin(edges)

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        self._path.take(held[0])
        return [held.pop()]


class Join(Step):
    """Where a path meets the layers again. Its rows must be no one else's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def push(self, held: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._path.add_to(held.pop())]
