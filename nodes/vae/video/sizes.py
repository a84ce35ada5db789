"""The sizes of a causal video VAE's decode or encode, and what a plan of it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ...prefer import Prefer

# A 1 x 1 x 1 convolution; a causal 3 x 3 x 3 one, behind a norm or not; a residual block; the
# attention of each frame; a doubling or halving of rows and columns, and of the frames.
Kind = Literal["point", "conv", "block", "attention", "up", "down", "time_up", "time_down"]


class Link(NamedTuple):
    """One layer of the chain: its kind, and the channels of its input and output."""

    kind: Kind
    given: int
    made: int


class Shortcut(NamedTuple):
    """A path without weights around several layers; its map is added to theirs.

    Where the layers double rows and columns, it repeats elements; where they halve them, it gives
    means of four; otherwise it is what they are given.

    first, last: the numbers of the first of the layers, and of the one behind them.
    given, made: its channels.
    way: what becomes of its rows and columns.
    frames: 2 where the layers double or halve the number of frames too, otherwise 1.
    """

    first: int
    last: int
    given: int
    made: int
    way: Literal["up", "down", "same"]
    frames: int

    def waiting_rows(self, given: int, made: int) -> int:
        """Of its map, the rows that exist for `given` of the first layer, less those in use.

        Args:
            made: rows that the last layer has made.
        """
        if self.way == "up":
            return given - made // 2
        return (given // 2 if self.way == "down" else given) - made


class Part(NamedTuple):
    """A part of the chain; the numbers of its shortcuts count from its own first layer."""

    links: tuple[Link, ...]
    shortcuts: tuple[Shortcut, ...]


@dataclass(frozen=True)
class VideoSizes:
    """The sizes of one decoder or encoder.

    is_decoder: maps grow; an encoder's shrink.
    links: the layers in the order of the calls.
    cut: the number of the first layer of the second part. Of a decoder, the first part runs on
        whole frames, and the second in strips; of an encoder, the other way round.
    shortcuts: the paths around layers. None leads across the cut.
    patch: the largest map has a position per `patch` x `patch` pixels, whose colours are its
        channels: of each colour, column by column.
    """

    is_decoder: bool
    links: tuple[Link, ...]
    cut: int
    shortcuts: tuple[Shortcut, ...] = ()
    patch: int = 1

    @property
    def factor(self) -> int:
        """Rows of the picture per row of the latent."""
        kinds = [link.kind for link in self.links]
        return self.patch * 2 ** sum(kind in ("up", "down") for kind in kinds)

    @property
    def frame_factor(self) -> int:
        """Frames of the video per frame of the latent, after the first of each."""
        return 2 ** sum(link.kind in ("time_up", "time_down") for link in self.links)

    @property
    def parts(self) -> tuple[Part, Part]:
        """The layers before and behind the cut."""
        cut = self.cut
        before = tuple(short for short in self.shortcuts if short.last <= cut)
        behind = tuple(
            short._replace(first=short.first - cut, last=short.last - cut)
            for short in self.shortcuts
            if short.first >= cut
        )
        return Part(self.links[:cut], before), Part(self.links[cut:], behind)


class VideoCall(NamedTuple):
    """The decode or encode of one sample.

    sizes: of the decoder or encoder.
    frames: of the latent, if it is decoded; otherwise of the video.
    height, width: of the picture, in pixels.
    dtype_bytes: of one element in the arithmetic.
    is_unrolled: convolutions hold a copy of their input for each tap, see `devices.is_unrolled`.
    """

    sizes: VideoSizes
    frames: int
    height: int
    width: int
    dtype_bytes: int
    is_unrolled: bool = False

    def sides(self) -> tuple[int, int]:
        """Rows and columns of the first layer's input."""
        factor = self.sizes.factor if self.sizes.is_decoder else self.sizes.patch
        return self.height // factor, self.width // factor


class VideoPlan(NamedTuple):
    """What was decided for one call.

    rows: of a strip, in pixels of the picture: a multiple of the sizes' `patch`.
    prefer: the preference that it serves.
    """

    rows: int
    prefer: Prefer


def shortcut_around(links: Sequence[Link], first: int, last: int) -> Shortcut:
    """The shortcut around the layers `first` to `last - 1` of a chain."""
    kinds = [link.kind for link in links[first:last]]
    way = "up" if "up" in kinds else "down" if "down" in kinds else "same"
    frames = 2 if "time_up" in kinds or "time_down" in kinds else 1
    return Shortcut(first, last, links[first].given, links[last - 1].made, way, frames)


def frames_made(kind: Kind, frames: int) -> int:
    """How many frames a layer makes of so many."""
    if kind == "time_up":
        return 2 * frames - 1
    return (frames + 1) // 2 if kind == "time_down" else frames
