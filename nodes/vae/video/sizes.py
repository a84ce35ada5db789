"""The sizes of a causal video VAE's decode or encode, and what a plan of it says."""

from __future__ import annotations

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


@dataclass(frozen=True)
class VideoSizes:
    """The sizes of one decoder or encoder.

    is_decoder: maps grow; an encoder's shrink.
    links: the layers in the order of the calls.
    cut: the number of the first layer of the second part. Of a decoder, the first part runs on
        whole frames, and the second in strips; of an encoder, the other way round.
    """

    is_decoder: bool
    links: tuple[Link, ...]
    cut: int

    @property
    def factor(self) -> int:
        """Rows of the picture per row of the latent."""
        kinds = [link.kind for link in self.links]
        return 2 ** sum(kind in ("up", "down") for kind in kinds)

    @property
    def frame_factor(self) -> int:
        """Frames of the video per frame of the latent, after the first of each."""
        return 2 ** sum(link.kind in ("time_up", "time_down") for link in self.links)

    @property
    def parts(self) -> tuple[tuple[Link, ...], tuple[Link, ...]]:
        """The layers before and behind the cut."""
        return self.links[: self.cut], self.links[self.cut :]


class VideoCall(NamedTuple):
    """The decode or encode of one sample.

    sizes: of the decoder or encoder.
    frames: of the latent, if it is decoded; otherwise of the video.
    height, width: of the picture, in pixels.
    dtype_bytes: of one element in the arithmetic.
    has_ram: rows may wait in RAM, see `devices.has_ram`.
    is_unrolled: convolutions hold a copy of their input for each tap, see `devices.is_unrolled`.
    """

    sizes: VideoSizes
    frames: int
    height: int
    width: int
    dtype_bytes: int
    has_ram: bool
    is_unrolled: bool = False

    def sides(self) -> tuple[int, int]:
        """Rows and columns of what the call is given."""
        factor = self.sizes.factor if self.sizes.is_decoder else 1
        return self.height // factor, self.width // factor


class VideoPlan(NamedTuple):
    """rows: of a strip, in pixels of the picture; prefer: the preference that it serves."""

    rows: int
    prefer: Prefer


def frames_made(kind: Kind, frames: int) -> int:
    """How many frames a layer makes of so many."""
    if kind == "time_up":
        return 2 * frames - 1
    return (frames + 1) // 2 if kind == "time_down" else frames
