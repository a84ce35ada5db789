"""How maps are cut into strips of rows, and attention into parts of the queries. Integers only."""

from __future__ import annotations

# Rows of its neighbours that a 3 x 3 convolution reads with a strip, above and below together.
HALO_ROWS = 2
# A stage holds back up to two rows, which make its last strip longer.
SLACK_ROWS = 2
# Fewer queries at a time leave a card idle; more parts save little beside the keys and values.
QUERY_ROWS, QUERY_PARTS = 4096, 8


def even_runs(height: int, limit: int) -> list[tuple[int, int]]:
    """Cuts rows into runs of nearly equal length: (start, stop), at most `SLACK_ROWS` over limit.

    Raises:
        ValueError: limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    # A strip that is longer by what a stage held back is not cut in two.
    parts = max(1, -(-(height - SLACK_ROWS) // limit))
    return [(part * height // parts, (part + 1) * height // parts) for part in range(parts)]


def longest_strip(height: int, limit: int) -> int:
    """Rows of the longest strip that a convolution reads, with its halo."""
    return -(-height // len(even_runs(height, limit))) + SLACK_ROWS + HALO_ROWS


def query_rows(tokens: int) -> int:
    """Queries at a time in the attention over so many tokens."""
    return min(tokens, max(QUERY_ROWS, -(-tokens // QUERY_PARTS)))
