"""The peak of a causal video VAE's decode or encode as a formula: over strips."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import NamedTuple

from ..cuts import query_rows
from .cuts import first_needed, heights, row_kinds, row_stops
from .sizes import Kind, Link, VideoCall, VideoPlan, frames_made

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
    """

    frames: int
    above: int
    before: int
    given_on: int
    at_work: int


def video_peak_bytes(call: VideoCall, plan: VideoPlan) -> int:
    """The peak of one sample's decode or encode on a card, in bytes.

    Includes what the call is given, not the result, weights and the workspaces of kernels.
    """
    sizes = call.sizes
    height, columns = call.sides()
    given = sizes.links[0].given * call.frames * height * columns
    first, second = sizes.parts
    kinds = row_kinds(first)
    cut_height = heights(kinds, height)[-1]
    cut_columns, frames = _columns(first, columns), _frames(first, call.frames)
    stored = first[-1].made * frames * cut_height * cut_columns
    # A single frame is stored when it is made, and its last strip goes when it is read.
    lasts = int(frames > 1)
    if sizes.is_decoder:
        whole = [[height] * (len(kinds) + 1)]
        stops = row_stops(row_kinds(second), cut_height, plan.rows, is_decoder=True)
        peak = _part(first, whole, columns, call.frames, call, [lasts * stored])
        row = second[-1].made * _columns(second, cut_columns) * _frames(second, frames)
        before = [[0] * len(stops[0]), *stops]
        held = [
            stored
            - stored * (done if lasts else stop)[0] // cut_height
            + lasts * row * (stop[-1] - done[-1])
            for done, stop in pairwise(before)
        ]
        peak = max(peak, _part(second, stops, cut_columns, frames, call, held))
    else:
        stops = row_stops(kinds, height, plan.rows, is_decoder=False)
        held = [lasts * stored, *[stored] * (len(stops) - 1)]
        peak = _part(first, stops, columns, call.frames, call, held)
        whole = [[cut_height] * (len(row_kinds(second)) + 1)]
        result = second[-1].made * frames * cut_height * cut_columns
        held = [lasts * (stored + result)]
        peak = max(peak, _part(second, whole, cut_columns, frames, call, held))
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
    links: Sequence[Link],
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
    peak, done, above = 0, [0] * len(stops[0]), [0] * len(links)
    for strip, stop in enumerate(stops):
        layers, place, width, count = [], 0, columns, frames
        for link in links:
            end = place + len(row_kinds([link]))
            edges = list(zip(done, stop, strict=True))[place : end + 1]
            is_last = stop[end] == stops[-1][end]
            layers.append(_held(_Layer(link, width, count, edges, is_last), call))
            place, width, count = end, _columns([link], width), _frames([link], count)
        before = sum(layer.before for layer in layers)
        for is_end in (False, True) if frames > 1 else (True,):
            given_on = 0
            kept = sum(map(_kept, above, layers, repeat(is_end), repeat(0)))
            for old, layer in zip(above, layers, strict=True):
                # At work, a layer holds a frame's rows from above and those for below.
                work = given_on + kept + layer.above // layer.frames + layer.at_work
                peak = max(peak, held[strip] + before + work)
                kept += _kept(old, layer, is_end, 1) - _kept(old, layer, is_end, 0)
                given_on += 0 if is_end else layer.given_on
        done, above = stop, [layer.above for layer in layers]
    return peak


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
