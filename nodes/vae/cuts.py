"""How maps are cut into strips of rows, and attention into parts of the queries. Integers only."""

from __future__ import annotations

from itertools import pairwise

from ..cuts import pieces

# Rows of its neighbours that a 3 x 3 convolution reads with a strip, above and below together.
HALO_ROWS = 2
# Strips have a multiple of so many rows.
UNIT_ROWS = 8
# Fewer queries at a time leave a card idle; more parts save little beside the keys and values.
QUERY_ROWS, QUERY_PARTS = 4096, 8


def strip_rows(height: int, limit: int) -> int:
    """Rows of the longest strip into which `strips` cuts a map.

    Raises:
        ValueError: limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    if limit >= height:
        return height
    if limit < UNIT_ROWS:
        return max(1, limit // 2 * 2)
    limit -= limit % UNIT_ROWS
    rows = -(-height // -(-height // limit))
    return -(-rows // UNIT_ROWS) * UNIT_ROWS


def strips(height: int, limit: int) -> list[tuple[int, int]]:
    """Cuts a map into strips of at most `limit` rows: (start, stop).

    All are equal but the first and the last, which are as long as each other where the height is
    a multiple of 4: so cuDNN sees few shapes. They begin at even rows, as upsampling makes two
    rows of one. Where strips have a multiple of 16 rows, half the limit cuts half the map alike.
    """
    rows = strip_rows(height, limit)
    count = -(-height // rows)
    if count < 2 or rows < UNIT_ROWS:
        return pieces(height, rows)
    first = (height - (count - 2) * rows + 1) // 4 * 2
    starts = [0, *range(first, first + (count - 2) * rows + 1, rows)]
    return list(pairwise([*starts, height]))


def query_rows(tokens: int) -> int:
    """Queries at a time in the attention over so many tokens."""
    return min(tokens, max(QUERY_ROWS, -(-tokens // QUERY_PARTS)))
