"""The plan of a decode or encode: what it stores, and what it recomputes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..prefer import PREFERENCES, Prefer, check_prefer

# Pixels of a strip at the picture's size. With fewer, a card waits for the next launch; with more,
# the strips that are held beside the maps grow.
STRIP_PIXELS = {"speed": 2**16, "balance": 2**16, "smallest": 2**14}
LEAST_STRIP_PIXELS = 2**14
# Into how many strips a small picture is cut, unless they fall below `LEAST_STRIP_PIXELS`.
STRIPS = {"speed": 8, "balance": 32, "smallest": 1}
LEAST_ROWS = 2
# Share of the rows of an encoder's largest map that is stored.
SHARES = {"speed": 1.0, "balance": 0.75, "smallest": 0.45}
# How many sizes of strips are tried when memory runs out, and the factor between them.
RETRIES, SHRINK = 3, 4


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


@dataclass(frozen=True)
class LevelPlan:
    """What is stored in full at one resolution.

    keeps_input: the input of the first block.
    keeps_hidden: the map between a block's two convolutions.
    keeps_output: the output of each block.
    limit: rows of a strip.
    in_ram: stored maps are in RAM.
    share: of an encoder's first level, the share of the rows that is stored, from the top.
    adds_after: an encoder's last block is summed behind the downsampling.
    """

    keeps_input: bool
    keeps_hidden: bool
    keeps_output: bool
    limit: int
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


def vae_plan(
    call: VaeCall, *, prefer: Prefer, strip_rows: int = 0, attempt: int = 0
) -> VaePlan | None:
    """The plan for one sample.

    Args:
        prefer: time (speed), memory (smallest), or balance.
        strip_rows: rows of a strip at the picture's size; 0 chooses.
        attempt: how many larger plans ran out of memory before.

    Returns:
        None if there is nothing smaller to try.

    Raises:
        ValueError: prefer is not one of `PREFERENCES`, or strip_rows < 0.
    """
    check_prefer(prefer)
    if strip_rows < 0:
        raise ValueError(f"strip_rows must be >= 0, got {strip_rows}")
    # First with smaller strips, then with the preferences that store less.
    shrinks = min(attempt, RETRIES - 1)
    place = PREFERENCES.index(prefer) + attempt - shrinks
    if place >= len(PREFERENCES):
        return None
    prefer, sizes = PREFERENCES[place], call.sizes
    automatic = max(LEAST_STRIP_PIXELS, call.height * call.width // STRIPS[prefer])
    pixels = strip_rows * call.width or min(STRIP_PIXELS[prefer], automatic)
    elements = pixels * (max(sizes.widths[-2:]) if sizes.is_decoder else sizes.widths[0])
    elements //= SHRINK**shrinks
    levels = []
    for level, channels in enumerate(sizes.widths):
        widest = max(channels, sizes.inputs(level))
        limit = max(LEAST_ROWS, elements * sizes.scale(level) // (widest * call.width))
        levels.append(_level_plan(call, level, prefer, limit))
    # In half types the rounded sums of taps would add to the error.
    return VaePlan(tuple(levels), call.dtype_bytes == 4, prefer)


def _level_plan(call: VaeCall, level: int, prefer: Prefer, limit: int) -> LevelPlan:
    sizes, has_ram = call.sizes, call.has_ram
    if not sizes.is_decoder:
        return _encoder_plan(sizes, level, prefer, limit)
    # 0 is the picture's own size; each level further has a fourth of the pixels.
    from_picture = len(sizes.widths) - 1 - level
    waits = prefer == "smallest" and has_ram
    recomputed = {"speed": 0, "balance": 1, "smallest": 3 if has_ram else 2}[prefer]
    if from_picture >= recomputed:
        return LevelPlan(True, True, True, limit)
    keeps_output = prefer == "balance" or has_ram or from_picture == 1
    return LevelPlan(False, False, keeps_output, limit, in_ram=waits and from_picture < 2)


def _encoder_plan(sizes: VaeSizes, level: int, prefer: Prefer, limit: int) -> LevelPlan:
    if level == 0:
        # Rows are recomputed from the picture through one block: with more blocks, store all.
        share = SHARES[prefer] if sizes.blocks == 2 else 1.0
        is_speed = prefer == "speed"
        return LevelPlan(False, is_speed, True, limit, share=share, adds_after=is_speed)
    if level == 1 and prefer != "speed":
        return LevelPlan(True, prefer == "balance", True, limit, adds_after=prefer == "balance")
    return LevelPlan(True, True, True, limit)
