"""How many heads and queries a slice of attention has, so that its buffers fit a budget."""

from __future__ import annotations

from typing import NamedTuple

from ..units import MIB

MODES = ("auto", "heads", "queries", "max")
# Slices of queries in multiples of this give the CPU's attention kernel the blocks it makes itself.
QUERY_MULTIPLE = 64
# What score and q/k/v buffers may take with mode auto: about what Z-Image's lean block holds at
# 1024x1024, so that attention is never far above the rest; the CPU is no slower for it.
BUDGET_BYTES = 128 * MIB
# Heads in one of the lean block's groups with mode auto: fewer save little memory and cost time.
AUTO_HEADS = 10


class Geometry(NamedTuple):
    """Sizes of one attention call; kv_heads < heads where query heads share keys and values."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    channels: int


class Slices(NamedTuple):
    """Heads and queries of one slice."""

    heads: int
    queries: int


class Workspace(NamedTuple):
    """Bytes that an attention function holds at its peak, for one head of one sample.

    per_score: for each pair of query and key.
    per_query: for each query.
    per_key: for each key.
    max_queries: so many queries share one score buffer at most, as the function slices itself.
    """

    per_score: int = 0
    per_query: int = 0
    per_key: int = 0
    max_queries: int | None = None


def workspace_bytes(shape: Geometry, workspace: Workspace, slices: Slices | None = None) -> int:
    """Returns what one slice, or without `slices` the whole call, holds at its peak, in bytes."""
    heads, queries = slices or (shape.heads, shape.queries)
    at_once = min(queries, workspace.max_queries or queries)
    per_head = at_once * shape.keys * workspace.per_score
    per_head += queries * workspace.per_query + shape.keys * workspace.per_key
    return shape.batch * heads * per_head


def fit(shape: Geometry, workspace: Workspace, budget_bytes: int) -> Slices:
    """Returns the fewest equal slices whose workspace is at most budget_bytes.

    Heads are cut first, because each slice of queries would copy key and value again;
    one head that is still too large is cut along its queries, at least QUERY_MULTIPLE of them.

    Raises:
        ValueError: budget_bytes < 1.
    """
    if budget_bytes < 1:
        raise ValueError(f"budget_bytes must be >= 1, got {budget_bytes}")
    if workspace_bytes(shape, workspace) <= budget_bytes:
        return Slices(shape.heads, shape.queries)
    most = budget_bytes // workspace_bytes(shape, workspace, Slices(1, shape.queries))
    if most >= 1:
        return Slices(-(-shape.heads // -(-shape.heads // most)), shape.queries)
    fixed = shape.batch * shape.keys * workspace.per_key
    one_query = shape.batch * (shape.keys * workspace.per_score + workspace.per_query)
    most = max(0, budget_bytes - fixed) // one_query
    most = max(1, most // QUERY_MULTIPLE)
    multiples = -(-shape.queries // QUERY_MULTIPLE)
    multiples = -(-multiples // -(-multiples // most))
    return Slices(1, min(shape.queries, multiples * QUERY_MULTIPLE))


def requested(shape: Geometry, mode: str, size: int = 0) -> Slices:
    """Returns the slices that a mode other than auto asks for.

    Args:
        mode: "heads": `size` heads at a time; "queries": `size` queries at a time, rounded up to
            a multiple of QUERY_MULTIPLE; "max": one head at a time.
        size: 0 takes half of the heads or queries.

    Raises:
        ValueError: an unknown mode, or size < 0.
    """
    if size < 0:
        raise ValueError(f"size must be >= 0, got {size}")
    if mode == "max":
        return Slices(1, shape.queries)
    if mode == "heads":
        return Slices(min(shape.heads, size or -(-shape.heads // 2)), shape.queries)
    if mode == "queries":
        multiples = -(-(size or -(-shape.queries // 2)) // QUERY_MULTIPLE)
        return Slices(shape.heads, min(shape.queries, multiples * QUERY_MULTIPLE))
    raise ValueError(f"mode must be heads, queries or max, got {mode!r}")


def block_heads(mode: str, size: int) -> int | None:
    """Heads in a group of a block that cuts its heads itself: 0 for half of them, None for all."""
    return {"auto": AUTO_HEADS, "max": 1, "heads": size}.get(mode)
