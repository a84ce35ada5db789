"""Where the denoiser is cut: chunks of tokens and groups of heads. Integers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..cuts import pieces

# The CPU's attention kernel works in smaller blocks where it gets fewer rows than this, which
# changes last bits. So a shorter rest joins the last chunk, unless the chunks are small anyway.
SHORTEST_REST = 192
LONG_CHUNK = 256
# Starts of chunks are multiples of this, which keeps the CPU's attention bit-exact.
CHUNK_MULTIPLE = 64
# Short of memory, the feed-forward computes its second factor in this many column blocks, so that
# one and a quarter hidden tensors live at once instead of two.
HIDDEN_BLOCKS = 4


class AttentionCuts(NamedTuple):
    """How the attention half of a layer is cut.

    spans: key/value heads of each group, (first, last).
    holds_query: q of a group is made beside its k and v, and held whole.
    made_tokens: rows at a time where q, k and v are made.
    earlier_tokens: rows of queries at a time in all groups but the last.
    last_tokens: in the last group, where the results of all are joined.
    keeps_rows: the rows that k and v are made of wait for q where the result goes.
    """

    spans: list[tuple[int, int]]
    holds_query: bool
    made_tokens: int
    earlier_tokens: int
    last_tokens: int
    keeps_rows: bool = False

    @property
    def products(self) -> int:
        """Products that make a chunk's q, k and v; one where their columns join."""
        return 1 if len(self.spans) == 1 else 2 + self.holds_query


@dataclass(frozen=True)
class DenoiserPlan:
    """How the denoiser is cut.

    groups: into how many groups the heads are cut; k and v of one group live at a time.
    chunk_tokens: rows at a time in the attention half; twice as many where q, k and v are made.
    feed_tokens: rows at a time in the feed-forward half.
    holds_query: q of a group is held whole beside its k and v, so that the source is normed once
        per group instead of twice.
    hidden_blocks: the feed-forward's second factor is computed in so many column blocks.
    holds_rope: the rope table is held whole, so that it is gathered once per forward.
    copy_elements: of a weight that is copied for its product, at a time; 0: all.
    holds_hidden: a block with a parallel feed-forward holds all its hidden rows beside q, so that
        a projection that comes whole is called once.
    parallel: of blocks whose feed-forward runs beside their attention, where there are some.
    """

    groups: int
    chunk_tokens: int
    feed_tokens: int
    holds_query: bool = False
    hidden_blocks: int = 1
    holds_rope: bool = True
    copy_elements: int = 0
    holds_hidden: bool = False
    parallel: DenoiserPlan | None = None

    def rope_tokens(self, dim: int, head_dim: int) -> int:
        """Rows whose rope table, 8 bytes a channel of a head, is no larger than a chunk's."""
        return max(1, self.chunk_tokens * dim // (4 * head_dim))

    def attention(
        self, kv_heads: int, *, is_whole: bool, norms_across: bool = False
    ) -> AttentionCuts:
        """The cuts of a layer. Where it `is_whole`, there is one group and q is held.

        Args:
            norms_across: the norms of q and k span all heads, so that each product is made whole.

        Raises:
            ValueError: groups < 1.
        """
        spans = head_groups(kv_heads, 1 if is_whole else self.groups)
        holds_query = self.holds_query or is_whole
        # A chunk is held once where it is made, and twice in the end. A product that comes whole is
        # held beside it. Earlier groups' results have fewer columns than what is joined.
        keeps_rows = norms_across and len(spans) == 1 and not holds_query
        made = 1 if is_whole or (norms_across and not keeps_rows) else 2
        earlier = len(spans) if holds_query and not norms_across else 1
        chunk = self.chunk_tokens
        return AttentionCuts(
            spans, holds_query, made * chunk, earlier * chunk, chunk, keeps_rows=keeps_rows
        )

    def feed_blocks(self, *, is_whole: bool) -> int:
        """Column blocks of the feed-forward's second factor; one where it comes whole."""
        return 1 if is_whole else self.hidden_blocks


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


def chunk_count(tokens: int, chunk_tokens: int) -> int:
    """How many `chunks` there are. Planning asks often, so no list is made."""
    joins = longest_chunk(tokens, chunk_tokens) > chunk_tokens
    return -(-tokens // chunk_tokens) - joins


def head_groups(kv_heads: int, groups: int) -> list[tuple[int, int]]:
    """Cuts the key/value heads into at most `groups` runs of nearly equal length: (first, last).

    Raises:
        ValueError: groups < 1.
    """
    if groups < 1:
        raise ValueError(f"groups must be >= 1, got {groups}")
    return pieces(kv_heads, -(-kv_heads // groups))


def joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same columns in fewer spans (first, last): each that begins where one ends is added."""
    runs = spans[:1]
    for first, last in spans[1:]:
        if runs[-1][1] == first:
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    return runs
