"""Where tokens and heads are cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack.nodes.denoiser.cuts import (
    LONG_CHUNK,
    SHORTEST_REST,
    chunk_count,
    chunks,
    head_groups,
    joined,
    longest_chunk,
)


@pytest.mark.parametrize(
    ("tokens", "chunk_tokens", "wanted"),
    [
        (0, 512, []),
        (1, 512, [(0, 1)]),
        (512, 512, [(0, 512)]),
        (3, 1, [(0, 1), (1, 2), (2, 3)]),
        (7, 3, [(0, 3), (3, 6), (6, 7)]),  # small chunks: the rest stays on its own
        (512 + 191, 512, [(0, 703)]),  # too short a rest joins
        (512 + 192, 512, [(0, 512), (512, 704)]),
        (1024 + 1, 512, [(0, 512), (512, 1025)]),
        (255 + 1, 255, [(0, 255), (255, 256)]),
        (256 + 1, 256, [(0, 257)]),
    ],
)
def test_chunks(tokens: int, chunk_tokens: int, wanted: list[tuple[int, int]]) -> None:
    assert chunks(tokens, chunk_tokens) == wanted


@given(st.integers(0, 20000), st.integers(1, 5000))
@settings(deadline=None, derandomize=True)
def test_chunks_cover_every_row_once_and_start_at_multiples(tokens: int, chunk: int) -> None:
    chunk = max(chunk, tokens // 50)
    runs = chunks(tokens, chunk)
    assert [row for run in runs for row in range(*run)] == list(range(tokens))
    assert chunk_count(tokens, chunk) == len(runs)
    assert all(start % chunk == 0 for start, _ in runs)
    assert longest_chunk(tokens, chunk) == max((stop - start for start, stop in runs), default=0)
    longest = chunk + SHORTEST_REST - 1 if chunk >= LONG_CHUNK else chunk
    assert all(0 < stop - start <= longest for start, stop in runs)
    if chunk >= LONG_CHUNK and len(runs) > 1:
        assert min(stop - start for start, stop in runs) >= SHORTEST_REST


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_refuses_less_than_one_row(chunk: int) -> None:
    with pytest.raises(ValueError, match=f"chunk_tokens must be >= 1, got {chunk}"):
        chunks(4, chunk)


@pytest.mark.parametrize(
    ("key_value", "groups", "wanted"),
    [
        (30, 1, [(0, 30)]),
        (30, 2, [(0, 15), (15, 30)]),
        (30, 4, [(0, 8), (8, 16), (16, 24), (24, 30)]),
        (5, 4, [(0, 2), (2, 4), (4, 5)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
        (3, 9, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_head_groups(key_value: int, groups: int, wanted: list[tuple[int, int]]) -> None:
    assert head_groups(key_value, groups) == wanted


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([], []),
        ([(0, 3)], [(0, 3)]),
        ([(0, 3), (3, 5), (5, 9)], [(0, 9)]),
        ([(0, 3), (4, 5), (5, 9)], [(0, 3), (4, 9)]),
        ([(4, 9), (0, 4)], [(4, 9), (0, 4)]),
    ],
)
def test_joined(spans: list[tuple[int, int]], wanted: list[tuple[int, int]]) -> None:
    assert joined(spans) == wanted
