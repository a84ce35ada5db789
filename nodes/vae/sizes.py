"""The sizes of a decode or encode, and what a plan of it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..prefer import Prefer

LEAST_ROWS = 2
# No tensor has more elements: torch's kernels for batch norms index with 32 bits.
MOST_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class VaeSizes:
    """The sizes of one decoder or encoder.

    is_decoder: maps grow; an encoder's shrink.
    widths: channels of each level, in the order of the calls.
    blocks: residual blocks per level.
    latent_channels: of the latent; of an encoder's result, mean and variance together.
    picture_channels: 3.
    """

    is_decoder: bool = True
    widths: tuple[int, ...] = (512, 512, 256, 128)
    blocks: int = 3
    latent_channels: int = 16
    picture_channels: int = 3

    def __post_init__(self) -> None:
        if not self.widths or min(self.widths) < 1 or self.blocks < 1:
            raise ValueError(f"widths and blocks must be >= 1, got {self.widths}, {self.blocks}")

    @property
    def factor(self) -> int:
        """Rows of the picture per row of the latent."""
        return 2 ** (len(self.widths) - 1)

    def inputs(self, level: int) -> int:
        """Channels of the input of the level's first block."""
        return self.widths[max(0, level - 1)]

    def scale(self, level: int) -> int:
        """Rows of the picture per row of the level's maps."""
        return 2 ** (len(self.widths) - 1 - level if self.is_decoder else level)


class VaeCall(NamedTuple):
    """The decode or encode of one sample.

    sizes: of the decoder or encoder.
    height, width: of the picture, in pixels.
    dtype_bytes: of one element in the arithmetic.
    has_ram: large maps may wait in RAM, see `devices.has_ram`.
    is_unrolled: convolutions hold a copy of their input for each tap, see `devices.is_unrolled`.
    """

    sizes: VaeSizes
    height: int
    width: int
    dtype_bytes: int
    has_ram: bool
    is_unrolled: bool = False

    def sides(self, level: int) -> tuple[int, int]:
        """Rows and columns of a level's maps."""
        scale = self.sizes.scale(level)
        if self.sizes.is_decoder:
            return -(-self.height // scale), -(-self.width // scale)
        return self.height // scale, self.width // scale


@dataclass(frozen=True)
class LevelPlan:
    """What is stored in full at one resolution.

    keeps_input: the input of the first block.
    keeps_hidden: the map between a block's two convolutions.
    keeps_output: the output of each block.
    limit: rows of a strip while the first block makes the level's map of the one before.
    later: rows of a strip otherwise.
    in_ram: stored maps are in RAM.
    share: of an encoder's first level, the share of the rows that is stored, from the top.
    adds_after: an encoder's last block is summed behind the downsampling.
    """

    keeps_input: bool
    keeps_hidden: bool
    keeps_output: bool
    limit: int = LEAST_ROWS
    later: int = LEAST_ROWS
    in_ram: bool = False
    share: float = 1.0
    adds_after: bool = False


@dataclass(frozen=True)
class VaePlan:
    """levels: one per resolution, in the order of the calls.

    is_fused: upsampling and its convolution are one operation with 4 / 9 of the arithmetic;
        otherwise only where the map is read for its statistics.
    prefer: the preference that it serves.
    """

    levels: tuple[LevelPlan, ...]
    is_fused: bool
    prefer: Prefer
