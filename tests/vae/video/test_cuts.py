"""Which rows exist after each strip."""

from __future__ import annotations

import pytest
from pack.nodes.vae.video.cuts import first_needed, heights, row_kinds, row_stops
from pack.nodes.vae.video.sizes import Kind, Link

CHAIN = [Link("block", 8, 8), Link("up", 8, 8), Link("block", 8, 8), Link("conv", 8, 3)]
DOWN = [Link("conv", 3, 8), Link("block", 8, 8), Link("down", 8, 8), Link("block", 8, 8)]


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 100])
def test_rows_of_a_decoder_are_those_that_its_strips_need(rows: int) -> None:
    kinds = row_kinds(CHAIN)
    of_map = heights(kinds, 9)
    stops = row_stops(kinds, 9, rows, is_decoder=True)
    assert of_map[-1] == 18
    assert [stop[-1] for stop in stops] == [min(18, n * rows) for n in range(1, len(stops) + 1)]
    _check(kinds, of_map, stops)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 100])
def test_rows_of_an_encoder_are_those_that_its_strips_allow(rows: int) -> None:
    kinds = row_kinds(DOWN)
    of_map = heights(kinds, 18)
    stops = row_stops(kinds, 18, rows, is_decoder=False)
    assert of_map[-1] == 9
    assert [stop[0] for stop in stops] == [min(18, n * rows) for n in range(1, len(stops) + 1)]
    _check(kinds, of_map, stops)


def _check(kinds: list[Kind], of_map: list[int], stops: list[list[int]]) -> None:
    assert stops[-1] == of_map
    done = [0] * len(of_map)
    for stop in stops:
        assert all(new >= old for new, old in zip(stop, done, strict=True))
        for number, kind in enumerate(kinds):
            # What the layer reads for its last row exists, and few rows wait for the next strip.
            last = {"up": stop[number + 1] // 2 + 1, "down": 2 * stop[number + 1] + 1}
            reads = last.get(kind, stop[number + 1] + 1)
            if stop[number + 1] > 0:
                assert stop[number] >= min(of_map[number], reads)
            assert stop[number] - first_needed(kind, stop[number + 1]) <= 3
        done = stop


def test_errors_say_what_must_hold() -> None:
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        row_stops(["conv"], 8, 0, is_decoder=True)
