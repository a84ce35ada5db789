"""The decode and encode of a causal video VAE: strips of rows outside, frames inside.

The layers of the smallest maps, among them the attention, run on whole frames; the others, which
are the peak, on strips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count, pairwise

import torch

from ..attention import Tick
from .cuts import heights, row_kinds, row_stops
from .layers import VideoLayers
from .sizes import VideoCall, VideoPlan, frames_made
from .step import Step
from .steps import made_steps

# Takes rows of all frames of the result, [1, C, T, n, W], with the number of their first row.
RowsWriter = Callable[[int, torch.Tensor], None]
# Gives the new rows of each frame for a strip, [1, C, n, W], and holds none that it gave.
_Source = Callable[[int], Iterator[torch.Tensor]]
# Takes a strip's rows of a frame, [1, C, n, W]: with the numbers of the strip and of the frame.
_Sink = Callable[[int, int, torch.Tensor], None]


def decode(
    latent: torch.Tensor,
    layers: VideoLayers,
    call: VideoCall,
    plan: VideoPlan,
    *,
    write: RowsWriter,
    tick: Tick,
) -> None:
    """Decodes one latent.

    Args:
        latent: [1, C, T, H, W], float, in the dtype and on the device of the arithmetic.
        write: takes the rows of the video.
        tick: gets the share of the work that is done since its last call; may raise to end it.

    Memory: `video_peak_bytes`.
    Exact: equal up to rounding to the host's decoder, whose convolutions get the same operands.
    """
    lower, upper = (part.links for part in call.sizes.parts)
    height, width = call.sides()
    patch = call.sizes.patch
    stops = row_stops(row_kinds(upper), height, plan.rows // patch, is_decoder=True)
    edges = [0, *(given for given, *_ in stops)]
    stored: list[torch.Tensor] = []

    def store(strip: int, frame: int, rows: torch.Tensor) -> None:
        if not stored:  # one tensor per strip, so that what was read can go
            for start, stop in pairwise(edges):
                shape = 1, upper[0].given, call.frames, stop - start, width
                stored.append(rows.new_empty(shape))
        for piece, start in zip(stored, edges, strict=False):
            piece[:, :, frame].copy_(rows[:, :, start : start + piece.shape[3]])

    run = _Run(layers, call, tick)
    run.strips(0, [[height] * (len(row_kinds(lower)) + 1)], lambda strip: _frames(latent), store)
    made: list[torch.Tensor] = []
    frames = run.frames(len(call.sizes.links))
    tops = [0, *(stop[-1] for stop in stops)]

    def collect(strip: int, frame: int, rows: torch.Tensor) -> None:
        if not made:
            _, channels, count, width = rows.shape
            shape = channels // patch**2, frames, patch * count, patch * width
            made.append(rows.new_empty(1, *shape))
        _patches(made[0][:, :, frame], patch).copy_(rows.unflatten(1, (-1, patch, patch)))
        if frame == frames - 1:
            write(patch * tops[strip], made.pop())

    run.strips(1, stops, lambda strip: _frames(stored.pop(0)), collect)


def encode(
    video: torch.Tensor,
    layers: VideoLayers,
    call: VideoCall,
    plan: VideoPlan,
    *,
    write: RowsWriter,
    tick: Tick,
) -> None:
    """Encodes one video to its latent.

    Args:
        video: [1, C, T, H, W], float, in the dtype and on the device of the arithmetic.
        write: takes the rows of the latent.
        tick: as for `decode`.

    Memory: `video_peak_bytes`.
    Exact: equal up to rounding to the host's encoder, whose convolutions get the same operands.
    """
    upper, lower = (part.links for part in call.sizes.parts)
    kinds, patch = row_kinds(upper), call.sizes.patch
    whole, _ = call.sides()
    height = heights(kinds, whole)[-1]
    stops = row_stops(kinds, whole, plan.rows // patch, is_decoder=False)
    edges = [0, *(given for given, *_ in stops)]
    tops = [0, *(stop[-1] for stop in stops)]
    run = _Run(layers, call, tick)
    stored: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    frames = run.frames(call.sizes.cut)

    def store(strip: int, frame: int, rows: torch.Tensor) -> None:
        if not stored:
            stored.append(rows.new_empty(1, rows.shape[1], frames, height, rows.shape[3]))
        stored[0][:, :, frame, tops[strip] : tops[strip + 1]].copy_(rows)

    def collect(strip: int, frame: int, rows: torch.Tensor) -> None:
        if not made:
            made.append(rows.new_empty(1, rows.shape[1], frames, *rows.shape[2:]))
        made[0][:, :, frame].copy_(rows)

    def given(strip: int) -> Iterator[torch.Tensor]:
        rows = video[:, :, :, patch * edges[strip] : patch * edges[strip + 1]]
        for frame in _frames(rows):
            yield frame if patch == 1 else _patches(frame, patch).flatten(1, 3)

    run.strips(0, stops, given, store)
    run.strips(
        1, [[height] * (len(row_kinds(lower)) + 1)], lambda strip: _frames(stored.pop()), collect
    )
    write(0, made.pop())


class _Run:
    """The parts of one sample's decode or encode."""

    def __init__(self, layers: VideoLayers, call: VideoCall, tick: Tick) -> None:
        self._layers, self._call, self._tick = layers, call, tick

    def frames(self, links: int) -> int:
        """Frames behind so many of the layers."""
        count = self._call.frames
        for link in self._call.sizes.links[:links]:
            count = frames_made(link.kind, count)
        return count

    def strips(self, part: int, stops: list[list[int]], source: _Source, sink: _Sink) -> None:
        """Runs a part of the layers strip by strip.

        Args:
            stops: see `row_stops`.
        """
        sizes = self._call.sizes
        start = part * sizes.cut
        frames, of_map = self.frames(start), stops[-1]
        chosen = sizes.parts[part]
        with ExitStack() as until:
            steps = made_steps(
                chosen,
                self._layers.links[start : start + len(chosen.links)],
                self._layers.convolve,
                until,
                heights=of_map,
                frames=frames,
                tick=lambda share: None,
            )
            of_frames = [placed.step for placed in steps]
            done = [0] * len(of_map)
            for strip, stop in enumerate(stops):
                for placed in steps:
                    placed.begin(done, stop)
                numbers = count()
                for rows in source(strip):
                    held = [rows]
                    del rows
                    pushed(
                        of_frames,
                        held,
                        lambda rows, strip=strip, numbers=numbers: sink(strip, next(numbers), rows),
                    )
                    self._tick(1 / (frames * len(stops)))
                done = stop


def _frames(video: torch.Tensor) -> Iterator[torch.Tensor]:
    """The frames [1, C, n, W] of [1, C, T, n, W]; holds none that it gave."""
    frames = list(video.unbind(2))
    del video
    while frames:
        yield frames.pop(0)


def _patches(rows: torch.Tensor, patch: int) -> torch.Tensor:
    """A view [1, C, patch, patch, n, W] of pixels [1, C, patch * n, patch * W]: columns first."""
    pixels = rows.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return pixels.permute(0, 1, 5, 3, 2, 4)


def pushed(
    steps: Sequence[Step], held: list[torch.Tensor], sink: Callable[[torch.Tensor], None]
) -> None:
    """Runs a frame through the steps. Of two frames made of it, the first goes to the end first."""
    if not steps:
        sink(held.pop())
        return
    made = steps[0].push(held)
    while made:
        pushed(steps[1:], [made.pop(0)], sink)
