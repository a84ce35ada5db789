"""Into how many strips a U-Net's maps are cut. Integers only."""

from __future__ import annotations

import math

from ..cuts import pieces
from .plan import BALANCE_SHARE, DenoiserChoice
from .sizes import TransformerSizes

# Each strip of a ResBlock norms the whole map again.
MOST_STRIPS = 8
# The CPU has another kernel for smaller maps, which changes last bits.
LEAST_PIXELS = 512
# A convolution's part may hold so many times what a transformer block may: the largest run where
# few skip tensors wait. "smallest" allows less.
SHARES = {"balance": 2, "smallest": 0.5}


def map_strips(
    sizes: TransformerSizes, choice: DenoiserChoice, made: int, out: int, scale: float
) -> int:
    """Into how many strips a map is cut, so that its part holds little beside its result.

    Args:
        sizes: of the transformer with the largest stream.
        made: channels of the map that a convolution takes.
        out: channels of what it makes, which is held whole.
        scale: latent pixels of a side in each of the map's.
    """
    if choice.prefer == "speed":
        return 1
    if choice.groups or choice.chunk_tokens:
        return MOST_STRIPS
    # Elements beside the stream in each of its tokens, then in each of the map's pixels.
    of_token = SHARES[choice.prefer] * (BALANCE_SHARE * sizes.stock_elements - sizes.dim)
    allowed = of_token * scale**2 / sizes.patch**2
    room = max(allowed - out, made / MOST_STRIPS)
    return min(MOST_STRIPS, math.ceil(made / room))


def strip_rows(height: int, width: int, strips: int) -> list[tuple[int, int]]:
    """The rows of at most so many strips of a map, (first, last); a short rest joins the last.

    Raises:
        ValueError: strips < 1.
    """
    if strips < 1:
        raise ValueError(f"strips must be >= 1, got {strips}")
    least = -(-LEAST_PIXELS // width)
    runs = pieces(height, max(-(-height // strips), least))
    if len(runs) > 1 and runs[-1][1] - runs[-1][0] < least:
        runs[-2:] = [(runs[-2][0], height)]
    return runs
