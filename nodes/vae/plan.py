"""What a decode or encode over strips stores, and what it computes again: the plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Prefer = Literal["speed", "balance", "smallest"]
PREFERENCES: tuple[Prefer, ...] = ("speed", "balance", "smallest")

# Pixels of a strip at the picture's size: fewer leave a card waiting for the next launch, more
# widen the strips that are held beside the maps.
STRIP_PIXELS = {"speed": 2**16, "balance": 2**16, "smallest": 2**14}
LEAST_STRIP_PIXELS = 2**14
# Into how many strips a small picture is cut, though not below the least pixels.
STRIPS = {"speed": 8, "balance": 32, "smallest": 1}
LEAST_ROWS = 2
# Rows of an encoder's largest map that are stored.
SHARES = {"speed": 1.0, "balance": 0.75, "smallest": 0.45}
# Sizes of strips that are tried after an out-of-memory error, and the factor between them.
RETRIES, SHRINK = 3, 4


@dataclass(frozen=True)
class VaeSizes:
    """One decoder or encoder.

    is_decoder: whether maps grow.
    widths: channels of each level, in the order of the calls.
    blocks: residual blocks per level.
    latent_channels: of the smallest map's outer side; with mean and variance of an encoder.
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
        """Channels of what the level's first block reads."""
        if level:
            return self.widths[level - 1]
        return self.widths[0]

    def scale(self, level: int) -> int:
        """Rows of the picture per row of the level's maps."""
        place = len(self.widths) - 1 - level if self.is_decoder else level
        return 2**place


@dataclass(frozen=True)
class LevelPlan:
    """What is stored in full at one resolution.

    keeps_input: what the first block reads.
    keeps_hidden: what stands between a block's convolutions.
    keeps_output: what a block gives.
    limit: rows of a strip.
    in_ram: what is stored lies in RAM.
    share: of the rows, what is stored of an encoder's first level, from the top.
    adds_after: an encoder's last block is added up behind the downsampling.
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

    is_fused: upsampling and its convolution are one with 4 / 9 of the arithmetic; else only where
        the map is made for its statistics.
    prefer: what it was made for.
    """

    levels: tuple[LevelPlan, ...]
    is_fused: bool
    prefer: Prefer


def vae_plan(
    sizes: VaeSizes,
    height: int,
    width: int,
    *,
    prefer: Prefer,
    strip_rows: int = 0,
    has_ram: bool = False,
    is_fused: bool = True,
    attempt: int = 0,
) -> VaePlan | None:
    """The plan for one sample.

    Args:
        sizes: of the decoder or encoder.
        height: of the picture, in pixels.
        width: likewise.
        prefer: which of memory and time.
        strip_rows: rows of a strip at the picture's size; 0 chooses.
        has_ram: maps may lie in RAM beside the device's memory.
        is_fused: see `VaePlan`.
        attempt: how many plans were too large before: each is smaller.

    Returns:
        None where there is nothing smaller to try.

    Raises:
        ValueError: prefer is not one of `PREFERENCES`, or strip_rows < 0.
    """
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer must be one of {PREFERENCES}, got {prefer!r}")
    if strip_rows < 0:
        raise ValueError(f"strip_rows must be >= 0, got {strip_rows}")
    # Smaller strips first, then what the next preferences store.
    shrinks = min(attempt, RETRIES - 1)
    harder = attempt - shrinks
    place = PREFERENCES.index(prefer) + harder
    if place >= len(PREFERENCES):
        return None
    prefer = PREFERENCES[place]
    pixels = strip_rows * width or _strip_pixels(prefer, height * width)
    elements = pixels * (max(sizes.widths[-2:]) if sizes.is_decoder else sizes.widths[0])
    elements //= SHRINK**shrinks
    levels = []
    for level, channels in enumerate(sizes.widths):
        widest = max(channels, sizes.inputs(level))
        limit = max(LEAST_ROWS, elements * sizes.scale(level) // (widest * width))
        levels.append(_level_plan(sizes, level, prefer, limit, has_ram))
    return VaePlan(tuple(levels), is_fused, prefer)


def is_fused_in(dtype_bytes: int) -> bool:
    """`VaePlan.is_fused` for a type: in half types the rounded sums would add to the error."""
    return dtype_bytes == 4


def _strip_pixels(prefer: Prefer, picture: int) -> int:
    return min(STRIP_PIXELS[prefer], max(LEAST_STRIP_PIXELS, picture // STRIPS[prefer]))


def _level_plan(
    sizes: VaeSizes, level: int, prefer: Prefer, limit: int, has_ram: bool
) -> LevelPlan:
    if not sizes.is_decoder:
        return _encoder_plan(sizes, level, prefer, limit)
    # Counted from the picture: its own size is 0, and each next one a fourth of the maps' pixels.
    from_picture = len(sizes.widths) - 1 - level
    if prefer == "speed" or from_picture > 2 or (prefer == "balance" and from_picture):
        return LevelPlan(True, True, True, limit)
    if prefer == "balance":
        return LevelPlan(False, False, True, limit)
    if has_ram:
        return LevelPlan(False, False, True, limit, in_ram=from_picture < 2)
    if from_picture == 2:
        return LevelPlan(True, True, True, limit)
    return LevelPlan(False, False, from_picture == 1, limit)


def _encoder_plan(sizes: VaeSizes, level: int, prefer: Prefer, limit: int) -> LevelPlan:
    if level == 0:
        # Rows are made anew from one stored map: of several blocks' maps only the first is.
        share = SHARES[prefer] if sizes.blocks == 2 else 1.0
        is_speed = prefer == "speed"
        return LevelPlan(False, is_speed, True, limit, share=share, adds_after=is_speed)
    if level == 1 and prefer != "speed":
        return LevelPlan(True, prefer == "balance", True, limit, adds_after=prefer == "balance")
    return LevelPlan(True, True, True, limit)
