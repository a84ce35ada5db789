"""The peak of a causal video VAE's decode or encode as a formula: over strips."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

from ..cuts import query_rows
from .cuts import first_needed, heights, row_kinds, row_stops
from .sizes import Kind, Link, Part, Shortcut, VideoCall, VideoPlan, frames_made

# Frames that a causal convolution reads.
TAPS = 3
AREA = 9  # taps of a convolution in rows and columns


class _Layer(NamedTuple):
    """A layer in one strip.

    columns, frames: of its input.
    edges: of each of its maps, the rows that exist before the strip and after it.
    is_last: whether its result is complete.
    """

    link: Link
    columns: int
    frames: int
    edges: list[tuple[int, int]]
    is_last: bool


class _Held(NamedTuple):
    """Elements that a layer holds in a strip.

    frames: of its input.
    above: for the strip below, of all frames.
    before: for the next frame.
    given_on: of the frames that it made and gives on one by one, until the last.
    at_work: while it works.
    waiting: more from then on, until a shortcut joins; less from there on.
    shared: of what waits, what the next layer is given.
    """

    frames: int
    above: int
    before: int
    given_on: int
    at_work: int
    waiting: int = 0
    shared: int = 0


def video_peak_bytes(call: VideoCall, plan: VideoPlan) -> int:
    """The peak of one sample's decode or encode on a card, in bytes.

    Includes what the call is given, not the result, weights and the workspaces of kernels.
    """
    sizes = call.sizes
    height, columns = call.sides()
    given = sizes.links[0].given * call.frames * height * columns
    before_cut, behind_cut = sizes.parts
    first, second = before_cut.links, behind_cut.links
    kinds = row_kinds(first)
    cut_height = heights(kinds, height)[-1]
    cut_columns, frames = _columns(first, columns), _frames(first, call.frames)
    stored = first[-1].made * frames * cut_height * cut_columns
    # A single frame is stored when it is made, and its last strip goes when it is read.
    lasts = int(frames > 1)
    if sizes.is_decoder:
        whole = [[height] * (len(kinds) + 1)]
        stops = row_stops(row_kinds(second), cut_height, plan.rows // sizes.patch, is_decoder=True)
        peak = _part(before_cut, whole, columns, call.frames, call, [lasts * stored])
        row = second[-1].made * _columns(second, cut_columns) * _frames(second, frames)
        before = [[0] * len(stops[0]), *stops]
        held = [
            stored
            - stored * (done if lasts else stop)[0] // cut_height
            + lasts * row * (stop[-1] - done[-1])
            for done, stop in pairwise(before)
        ]
        peak = max(peak, _part(behind_cut, stops, cut_columns, frames, call, held))
    else:
        stops = row_stops(kinds, height, plan.rows // sizes.patch, is_decoder=False)
        held = [lasts * stored, *[stored] * (len(stops) - 1)]
        peak = _part(before_cut, stops, columns, call.frames, call, held)
        whole = [[cut_height] * (len(row_kinds(second)) + 1)]
        result = second[-1].made * frames * cut_height * cut_columns
        held = [lasts * (stored + result)]
        peak = max(peak, _part(behind_cut, whole, cut_columns, frames, call, held))
    return call.dtype_bytes * (given + peak)


def _columns(links: Sequence[Link], columns: int) -> int:
    for link in links:
        columns = columns * 2 if link.kind == "up" else columns
        columns = columns // 2 if link.kind == "down" else columns
    return columns


def _frames(links: Sequence[Link], frames: int) -> int:
    for link in links:
        frames = frames_made(link.kind, frames)
    return frames


def _part(
    part: Part,
    stops: list[list[int]],
    columns: int,
    frames: int,
    call: VideoCall,
    held: list[int],
) -> int:
    """The most elements that a part of the layers holds.

    Args:
        held: besides, in each strip.
    """
    peak, done, above = 0, [0] * len(stops[0]), []
    for strip, stop in enumerate(stops):
        layers = _steps(part, list(zip(done, stop, strict=True)), columns, frames, call, stops[-1])
        above = above or [0] * len(layers)
        before = sum(layer.before for layer in layers)
        for is_end in (False, True) if frames > 1 else (True,):
            given_on = waiting = shared = 0
            kept = sum(map(_kept, above, layers, repeat(is_end), repeat(0)))
            for old, layer in zip(above, layers, strict=True):
                # At work, a layer holds a frame's rows from above and those for below.
                work = given_on + kept + layer.above // layer.frames + layer.at_work
                peak = max(peak, held[strip] + before + work + waiting - shared)
                kept += _kept(old, layer, is_end, 1) - _kept(old, layer, is_end, 0)
                given_on += 0 if is_end else layer.given_on
                waiting, shared = waiting + layer.waiting, layer.shared
        done, above = stop, [layer.above for layer in layers]
    return peak


def _steps(
    part: Part,
    edges: list[tuple[int, int]],
    columns: int,
    frames: int,
    call: VideoCall,
    heights: list[int],
) -> list[_Held]:
    """What each step holds in a strip, those of shortcuts among them.

    Args:
        edges: see `_Layer`, here of all maps.
        heights: of all maps.
    """
    found: list[_Held] = []
    place, places = 0, [0]
    for link in part.links:
        place += len(row_kinds([link]))
        places.append(place)
    forks: dict[Shortcut, _Held] = {}
    for number, link in enumerate(part.links):
        first, last = places[number], places[number + 1]
        for short in part.shortcuts:
            if short.first == number:
                ends = edges[first], edges[places[short.last]]
                forks[short] = _fork(short, *ends, columns, frames)
                found.append(forks[short])
        is_last = edges[last][1] == heights[last]
        layer = _Layer(link, columns, frames, edges[first : last + 1], is_last)
        found.append(_held(layer, call))
        columns, frames = _columns([link], columns), _frames([link], frames)
        for short in part.shortcuts:
            if short.last == number + 1:
                rows = edges[last][1] - edges[last][0]
                waiting = forks[short].waiting
                # Two frames get of one, and the first goes to the end before the second comes.
                given_on = waiting if short.way == "up" and short.frames > 1 else 0
                at_work = short.made * rows * columns
                found.append(_Held(frames, 0, 0, given_on, at_work, -waiting))
    return found


def _fork(
    short: Shortcut, given: tuple[int, int], made: tuple[int, int], columns: int, frames: int
) -> _Held:
    """What a shortcut holds; given, made: the edges where it leaves the layers and joins them."""
    new, above, below = given[1] - given[0], *map(short.waiting_rows, given, made)
    rows = short.given * columns  # elements per row
    if short.way != "down":
        return _Held(
            frames, below * rows * frames, 0, 0, new * rows, (above + new) * rows, new * rows
        )
    means = given[1] // 2 - given[0] // 2
    odd = given[1] % 2 * rows
    # The rows, in the order of the mean, and the mean: of half of the columns.
    work = (new + 2 * means) * rows + means * rows // 2
    waiting = (above + means) * rows // 2
    pair = short.frames if frames > 1 else 1
    kept = (below * rows // 2 + odd) * frames
    return _Held(frames, kept, 0, 0, work + (pair - 1) * waiting, pair * waiting)


def _kept(old: int, layer: _Held, is_end: bool, begun: int) -> int:
    """Elements that a layer keeps of all frames, while its second or its last is at work.

    Frame by frame, rows for the strip below replace those of the strip above.

    Args:
        old: of the strip above.
        begun: 1 if the layer is done with that frame.
    """
    done = begun + (layer.frames - 1 if is_end else 1)
    return old + (layer.above - old) * min(done, layer.frames) // layer.frames


def _held(layer: _Layer, call: VideoCall) -> _Held:
    link, columns, frames, edges, _ = layer
    kind, is_video = link.kind, frames > 1
    given, made = link.given * columns, link.made * _columns([link], columns)
    count, results = edges[0][1] - edges[0][0], edges[-1][1] - edges[-1][0]
    taps = TAPS if is_video else 1
    if kind == "attention":
        tokens = edges[0][1] * columns
        part = query_rows(tokens)
        # The queries at work, what is made of them, and what was made of those before.
        parts = 2 + (part < tokens)
        return _Held(frames, 0, 0, 0, link.given * (4 * tokens + parts * part))
    if kind == "point":
        return _Held(frames, 0, 0, 0, given * count + made * results)
    if kind == "time_up":
        one = given * count
        return _Held(frames, 0, 2 * one * is_video, 2 * one * is_video, (TAPS + 2) * one * is_video)
    if kind == "time_down":
        one = given * count
        return _Held(frames, 0, 2 * one * is_video, 0, (TAPS + 1) * one * is_video)
    rows = _above_rows(kind if kind != "block" else "conv", edges[0], edges[1])
    last = layer.is_last
    if kind in ("up", "down"):
        window = link.given * (
            (results + 2) * 2 * columns if kind == "up" else (2 * results + 1) * (columns + 1)
        )
        unrolled = AREA * link.given * results * _columns([link], columns) * call.is_unrolled
        work = max(given * count, made * results + unrolled) + window
        return _Held(frames, 0 if last else rows * given * frames, 0, 0, work)

    def conv(width: int, of_map: int) -> tuple[int, int]:
        """A window, and its two frames for the next."""
        n = edges[of_map][1] - edges[of_map][0]
        one = width * (n + 2) if n else 0
        unrolled = taps * AREA * width * n * call.is_unrolled
        return taps * one + unrolled, (TAPS - 1) * one * is_video

    window, before = conv(given, 1)
    if kind == "conv":
        work = window + max((given + columns) * count, made * results)
        return _Held(frames, 0 if last else rows * given * frames, before, 0, work)
    hidden = edges[1][1] - edges[1][0]
    second, later = conv(made, 2)
    above = rows * given + _above_rows("conv", edges[1], edges[2]) * made
    shortcut = made * results if link.given != link.made else 0
    work = given * count + max(
        window + made * hidden,
        (made + columns) * hidden + second,
        second + made * results,
        made * results + shortcut,
    )
    return _Held(frames, 0 if last else above * frames, before + later, 0, work)


def _above_rows(kind: Kind, given: tuple[int, int], made: tuple[int, int]) -> int:
    """Rows that a layer keeps of a frame after a strip."""
    return given[1] - first_needed(kind, made[1])
