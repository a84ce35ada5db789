"""The chosen slices fit the budget, and no larger ones would."""

from __future__ import annotations

import pytest
from pack.nodes.attention import budget as attention_budget
from pack.nodes.attention.budget import Workspace
from pack.nodes.attention.slices import Geometry, Slices

MIB = 2**20
# Z-Image at 1024x1024 with 256 text tokens.
Z_IMAGE = Geometry(batch=1, heads=30, kv_heads=30, queries=4352, keys=4352, channels=128)
WORKSPACE = Workspace(per_score=4, per_query=512, per_key=1024)


@pytest.mark.parametrize("side", [32, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("budget_mib", [64, 256, 1024])
def test_the_slice_fits_and_the_next_larger_does_not(
    side: int, batch: int, budget_mib: int
) -> None:
    tokens = (side // 16) ** 2 + 256
    shape = Z_IMAGE._replace(batch=batch, queries=tokens, keys=tokens)
    budget = budget_mib * MIB

    def need(slices: Slices) -> int:
        return attention_budget.workspace_bytes(shape, WORKSPACE, slices)

    slices = attention_budget.fit(shape, WORKSPACE, budget)
    smallest = need(Slices(1, 64))
    assert need(slices) <= max(budget, smallest)
    if slices == (shape.heads, tokens):
        assert need(slices) == attention_budget.workspace_bytes(shape, WORKSPACE)
    elif slices.queries == tokens:
        fewer = -(-shape.heads // slices.heads) - 1
        assert need(Slices(-(-shape.heads // fewer), tokens)) > budget
    else:
        assert slices.heads == 1 and slices.queries % 64 == 0
        assert need(Slices(1, tokens)) > budget


def test_nothing_to_shrink() -> None:
    assert attention_budget.fit(Z_IMAGE, Workspace(), 1) == (30, 4352)


def test_a_function_that_slices_itself_counts_its_own_slice() -> None:
    shape = Z_IMAGE._replace(queries=16640, keys=16640)
    itself = Workspace(per_score=4, max_queries=4096)
    whole = attention_budget.workspace_bytes(shape, itself)
    assert whole == 30 * 4096 * 16640 * 4
    assert attention_budget.fit(shape, itself, whole) == (30, 16640)


@pytest.mark.parametrize(
    ("mode", "size", "wanted"),
    [
        ("heads", 0, (15, 4352)),
        ("heads", 7, (7, 4352)),
        ("heads", 99, (30, 4352)),
        ("queries", 0, (30, 2176)),
        ("queries", 1000, (30, 1024)),
        ("queries", 1, (30, 64)),
        ("queries", 9999, (30, 4352)),
        ("max", 0, (1, 4352)),
        ("max", 5, (1, 4352)),
    ],
)
def test_requested(mode: str, size: int, wanted: tuple[int, int]) -> None:
    assert attention_budget.requested(Z_IMAGE, mode, size) == wanted


def test_errors() -> None:
    with pytest.raises(ValueError, match="mode must be heads, queries or max, got 'auto'"):
        attention_budget.requested(Z_IMAGE, "auto")
    with pytest.raises(ValueError, match="size must be >= 0, got -1"):
        attention_budget.requested(Z_IMAGE, "heads", -1)
    with pytest.raises(ValueError, match="budget_bytes must be >= 1, got 0"):
        attention_budget.fit(Z_IMAGE, WORKSPACE, 0)
