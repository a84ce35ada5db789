"""Chooses how one call of the denoiser is cut."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..prefer import PREFERENCES, Prefer, check_prefer
from .cost import attention_launches, feed_forward_launches
from .cuts import CHUNK_MULTIPLE, HIDDEN_BLOCKS, DenoiserPlan
from .parallel_plan import parallel_plan
from .peak import attention_elements, feed_forward_elements
from .products import copy_elements
from .sizes import Request, TransformerSizes

# Rows that a product needs to fill a large card: see `fill_tokens`.
FILL_TOKENS = 1024
# Rows of a product's tile in cuBLAS, and its columns.
TILE_ROWS, TILE_COLUMNS = 128, 256
# "smallest" goes below, where narrow products with few rows are the price.
LEAST_TOKENS = 256
# The peak of a block that "speed" allows, as a share of the host's, where layers that hold more
# than what is asked could hold more than the host does.
SPEED_SHARE = 0.97
# The peak of a block that "balance" allows, as a share of the host's.
BALANCE_SHARE = 0.26
# Where k and v alone are about that much, it allows stream, k and v and this share of a stream.
BALANCE_ROOM = 1 / 3
# Chunks of "speed" and "balance" for each stream that lives, unless another setting asks for less
# memory.
MOST_CHUNKS = 4
# Where less memory is all that counts, fewer launches are taken for this factor of it.
SLACK = 1.025


@dataclass(frozen=True)
class DenoiserChoice:
    """What the user chose.

    prefer: speed: the fewest launches. balance: the fewest whose peak is about a quarter of the
        host's. smallest: the least memory.
    groups: into how many groups the heads are cut; 0 chooses.
    chunk_tokens: rows at a time; 0 chooses.
    """

    prefer: Prefer = "balance"
    groups: int = 0
    chunk_tokens: int = 0

    def __post_init__(self) -> None:
        check_prefer(self.prefer)
        for name in ("groups", "chunk_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def __str__(self) -> str:
        parts = [self.prefer]
        if self.groups:
            parts.append(f"head_groups {self.groups}")
        if self.chunk_tokens:
            parts.append(f"chunk_tokens {self.chunk_tokens}")
        return ", ".join(parts)

    def at_least(self, groups: int) -> DenoiserChoice:
        """The choice with at least that many groups."""
        return replace(self, groups=max(self.groups, groups if groups > 1 else 0))

    def and_also(self, other: DenoiserChoice) -> DenoiserChoice:
        """The choice that saves as much memory as each of two does."""
        prefer = PREFERENCES[max(map(PREFERENCES.index, (self.prefer, other.prefer)))]
        chunk = min(filter(None, (self.chunk_tokens, other.chunk_tokens)), default=0)
        return DenoiserChoice(prefer, max(self.groups, other.groups), chunk)


DEFAULT = DenoiserChoice()


def fill_tokens(multiprocessors: int, dim: int) -> int:
    """Rows with which a product to `dim` columns has a tile for each multiprocessor of a card."""
    return TILE_ROWS * -(-multiprocessors // -(-dim // TILE_COLUMNS))


def denoiser_plan(
    request: Request, choice: DenoiserChoice = DEFAULT, *, fill: int = FILL_TOKENS
) -> DenoiserPlan:
    """The plan of the whole forward; arguments as `plan_for`."""
    return plan_for(request.sizes, request.batch, request.lengths, choice, fill=fill)


@functools.lru_cache(maxsize=256)
def plan_for(
    sizes: TransformerSizes,
    batch: int,
    lengths: tuple[int, ...],
    choice: DenoiserChoice,
    *,
    fill: int = FILL_TOKENS,
) -> DenoiserPlan:
    """The plan with the fewest launches whose peak the choice allows.

    It depends on the shape, the choice and the kind of card alone, not on what is free: the same
    request gives the same picture each time.

    Args:
        batch: samples in the stream; a block takes them one by one.
        lengths: tokens of a sample in the main blocks; then in the refiners, which have the same
            plan, and whose last chunk may be longer.
        fill: rows of a chunk, at least; see `fill_tokens`.
    """
    tokens = lengths[0]
    found = candidates(sizes, batch, tokens, choice, fill)
    base = DenoiserPlan(choice.groups or 1, tokens, tokens, holds_rope=found.holds_rope)
    if sizes.is_copied:
        base = replace(base, copy_elements=copy_elements(choice.prefer, found.limit))
    attention = [
        replace(base, groups=n, chunk_tokens=chunk, holds_query=holds)
        for n in found.groups
        for chunk in found.chunks
        for holds in (True, False)
    ]
    feed = [
        replace(base, feed_tokens=chunk, hidden_blocks=blocks)
        for chunk in found.chunks
        for blocks in (1, HIDDEN_BLOCKS)
    ]
    stream = sizes.streams * batch * tokens * sizes.dim

    def weighed(
        plans: Sequence[DenoiserPlan],
        elements: Callable[[TransformerSizes, int, DenoiserPlan], int],
        launches: Callable[[TransformerSizes, int, DenoiserPlan], int],
    ) -> list[tuple[int, int, DenoiserPlan]]:
        return [
            (stream + max(elements(sizes, n, p) for n in lengths), launches(sizes, tokens, p), p)
            for p in plans
        ]

    halves = (
        weighed(attention, attention_elements, attention_launches),
        weighed(feed, feed_forward_elements, feed_forward_launches),
    )
    least = SLACK * max(min(peak for peak, _, _ in half) for half in halves)
    limit = max(least, found.limit)
    of_attention, of_feed = (
        min((w for w in half if w[0] <= limit), key=lambda w: (w[1], w[0]))[2] for half in halves
    )
    plan = replace(
        of_attention, feed_tokens=of_feed.feed_tokens, hidden_blocks=of_feed.hidden_blocks
    )
    if not sizes.is_parallel:
        return plan
    parallel = parallel_plan(
        sizes, batch, tokens, base, groups=found.groups, chunks=found.chunks, limit=found.limit,
        slack=SLACK,
    )  # fmt: skip
    return replace(plan, parallel=parallel)


class Candidates(NamedTuple):
    """What a plan is chosen from.

    groups, chunks: of heads and of tokens.
    limit: elements of stream and block; 0 for as few as possible.
    holds_rope: see DenoiserPlan.
    """

    groups: list[int]
    chunks: list[int]
    limit: float
    holds_rope: bool


def candidates(
    sizes: TransformerSizes, batch: int, tokens: int, choice: DenoiserChoice, fill: int
) -> Candidates:
    """What the plan of a block is chosen from; arguments as `plan_for`."""
    is_by_head = choice.groups >= sizes.kv_heads > 1 and choice.prefer != "speed"
    prefer: Prefer = "smallest" if is_by_head else choice.prefer
    is_least = prefer == "smallest"
    limit = _limit(sizes, batch, tokens, choice, prefer)
    if choice.chunk_tokens:
        chunks = [choice.chunk_tokens]
    elif is_least:
        chunks = list(_chunks(tokens, LEAST_TOKENS))
    else:  # where no plan is within a limit, many chunks would save little
        most = MOST_CHUNKS * sizes.streams
        chunks = list(_chunks(tokens, max(fill, tokens // most) if limit else fill))
    if choice.groups:
        groups = [choice.groups]
    elif is_least:
        groups = _many_groups(sizes.kv_heads)
    else:
        groups = [1, 2] if choice.chunk_tokens else [1]
    return Candidates(groups, chunks, limit, not is_least)


def _limit(
    sizes: TransformerSizes, batch: int, tokens: int, choice: DenoiserChoice, prefer: Prefer
) -> float:
    """Elements of stream and block that a choice allows; 0 for as few as possible."""
    if prefer == "speed":
        is_plain = not (sizes.is_whole or sizes.is_quantised or sizes.is_copied)
        if is_plain or not sizes.stock_elements:
            return float("inf")
        return SPEED_SHARE * batch * tokens * sizes.stock_elements
    if prefer == "smallest" or choice.groups or choice.chunk_tokens:
        return 0
    of_host = sizes.stock_elements or 4 * (sizes.ffn_dim + sizes.dim)
    shared = 2 * sizes.kv_heads * sizes.head_dim
    least = (batch * sizes.streams + BALANCE_ROOM) * sizes.dim + shared
    return tokens * max(BALANCE_SHARE * batch * of_host, least)


def _chunks(tokens: int, least: int) -> Iterator[int]:
    """Lengths of chunks of equal length, from the whole to `least`, of many chunks a sample."""
    count = 1
    while count == 1 or tokens // count >= least:
        length = -(-tokens // count)
        yield min(tokens, -(-length // CHUNK_MULTIPLE) * CHUNK_MULTIPLE)
        count += max(1, count // 8)


def _many_groups(heads: int) -> list[int]:
    """Numbers of equal groups that hold little of k and v: up to three heads each."""
    return [n for n in range(1, heads + 1) if heads % n == 0 and 3 * n >= heads]
