"""Which rows of each map of a chain of layers exist before and after each strip. Integers only.

Each row of each map is computed once. So a strip brings each layer only the rows that are new; the
layer keeps the rows above them that its later results need again, at most three.

Two adjacent layers share a map, so a chain of n layers has n + 1 maps. A residual block counts as
two layers: its convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...cuts import pieces
from .sizes import Kind, Link


def row_kinds(links: Sequence[Link]) -> list[Kind]:
    """The kinds of the layers, with two convolutions for a residual block."""
    kinds: list[Kind] = []
    for link in links:
        if link.kind == "block":
            kinds.extend(("conv", "conv"))
        else:
            kinds.append(link.kind)
    return kinds


def heights(kinds: Sequence[Kind], height: int) -> list[int]:
    """Rows of each map, from the chain's input to its output."""
    found = [height]
    for kind in kinds:
        height = height * 2 if kind == "up" else height
        height = height // 2 if kind == "down" else height
        found.append(height)
    return found


def row_stops(
    kinds: Sequence[Kind], height: int, rows: int, *, is_decoder: bool
) -> list[list[int]]:
    """For each strip, the row before which each map is complete after it.

    Args:
        height: rows of the chain's input.
        rows: of a strip of the picture: a decoder's output, an encoder's input.

    Raises:
        ValueError: rows < 1.
    """
    of_map = heights(kinds, height)
    picture = of_map[-1 if is_decoder else 0]
    found = []
    for _, stop in pieces(picture, rows):
        stops = [stop]
        if is_decoder:
            for number in reversed(range(len(kinds))):
                stops.insert(0, _needed(kinds[number], stops[0], of_map[number]))
        else:
            for number, kind in enumerate(kinds):
                is_whole = stops[-1] == of_map[number]
                stops.append(of_map[number + 1] if is_whole else _possible(kind, stops[-1]))
        found.append(stops)
    return found


def first_needed(kind: Kind, done: int) -> int:
    """The first row of its input that a layer needs for results from row `done` on."""
    if kind == "down":
        return 2 * done
    if kind == "up":
        return max(done - 1, 0) // 2
    return max(done - 1, 0) if kind == "conv" else done


def _needed(kind: Kind, stop: int, height: int) -> int:
    """Rows of its input, of which there are `height`, that a layer needs for `stop` results."""
    if kind == "up":
        return min(height, stop // 2 + 1)
    return min(height, stop + 1) if kind == "conv" else stop


def _possible(kind: Kind, stop: int) -> int:
    """Rows that a layer can make of the first `stop` rows, while more are to come."""
    if kind == "down":
        return max(stop - 1, 0) // 2
    return max(stop - 1, 0) if kind == "conv" else stop
