"""Where the denoiser is cut: chunks of tokens and groups of heads. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

from ..cuts import pieces

# The CPU's attention kernel works in smaller blocks where it gets fewer rows than this, which
# changes last bits. So a shorter rest joins the last chunk, unless the chunks are small anyway.
SHORTEST_REST = 192
LONG_CHUNK = 256
# From this many groups on, q of a group is held whole beside its k and v. The source is then normed
# once per group instead of twice, and q takes no more than a sixteenth of the source.
QUERY_GROUPS = 16
# The feed-forward computes its second factor in this many column blocks, so that one and a quarter
# hidden tensors live at once instead of two.
HIDDEN_BLOCKS = 4


@dataclass(frozen=True)
class DenoiserPlan:
    """How the denoiser is cut.

    groups: into how many groups the heads are cut; k and v of one group live at a time.
    chunk_tokens: rows at a time.
    """

    groups: int
    chunk_tokens: int


def chunks(tokens: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Cuts `tokens` rows into chunks of `chunk_tokens`, (start, stop); a short rest joins the last.

    Raises:
        ValueError: chunk_tokens < 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")
    runs = pieces(tokens, chunk_tokens)
    if longest_chunk(tokens, chunk_tokens) > chunk_tokens:
        runs[-2:] = [(runs[-2][0], tokens)]
    return runs


def longest_chunk(tokens: int, chunk_tokens: int) -> int:
    """Rows of the longest of `chunks`."""
    rest = tokens % chunk_tokens
    joins = 0 < rest < SHORTEST_REST and chunk_tokens >= LONG_CHUNK
    return min(tokens, chunk_tokens + (rest if joins else 0))


def head_groups(kv_heads: int, groups: int) -> list[tuple[int, int]]:
    """Cuts the key/value heads into at most `groups` runs of nearly equal length: (first, last).

    Raises:
        ValueError: groups < 1.
    """
    if groups < 1:
        raise ValueError(f"groups must be >= 1, got {groups}")
    return pieces(kv_heads, -(-kv_heads // groups))
