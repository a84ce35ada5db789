"""The lines of a workflow's links, as the page's classic canvas draws them at first."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

TITLE_PX, SLOT_PX, WIDGET_PX = 30, 20, 24
GROUP_TITLE_PX, LETTER_PX = 34, 13  # a group's title: its height, and the width of a letter at most
_SAMPLES = 64

Point = tuple[float, float]


class Faults(NamedTuple):
    """Links that are hard to follow, as ``(link id, node id)`` and as link ids."""

    behind: list[tuple[int, int]]  # the link passes through that node's box
    backwards: list[int]  # its target stands to the left of its source
    titles: list[tuple[int, str]]  # the link passes through the title of that group


def _boxed(node: dict[str, Any], point: Point) -> bool:
    (x, y), (width, height) = node["pos"], node["size"]
    return x < point[0] < x + width and y - TITLE_PX < point[1] < y + height


def _titled(group: dict[str, Any], point: Point) -> bool:
    x, y = group["bounding"][:2]
    width = len(group["title"]) * LETTER_PX
    return x < point[0] < x + width and y < point[1] < y + GROUP_TITLE_PX


def slot_point(node: dict[str, Any], slot: int, *, is_output: bool) -> Point:
    """Where a link ends on the node. Widgets lie below the slots, one row each."""
    (x, y), (width, _) = node["pos"], node["size"]
    if is_output:
        return x + width - 9, y + (slot + 0.7) * SLOT_PX
    plain = [taken for taken in node["inputs"] if "widget" not in taken]
    taken = node["inputs"][slot]
    if taken in plain:
        return x + 10, y + (plain.index(taken) + 0.7) * SLOT_PX
    row = [taken for taken in node["inputs"] if "widget" in taken].index(taken)
    rows = max(len(plain), len(node["outputs"]))
    return x + 10, y + rows * SLOT_PX + 16 + row * WIDGET_PX


def curve(start: Point, end: Point) -> list[Point]:
    """Points of the page's spline between two slots."""
    reach = math.dist(start, end) / 4
    xs = (start[0], start[0] + reach, end[0] - reach, end[0])
    ys = (start[1], start[1], end[1], end[1])
    points = []
    for step in range(_SAMPLES + 1):
        t = step / _SAMPLES
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3)
        x, y = (sum(w * v for w, v in zip(weights, axis, strict=True)) for axis in (xs, ys))
        points.append((x, y))
    return points


def faults(workflow: dict[str, Any]) -> Faults:
    """The links that pass behind a node or a group's title, and those that run to the left."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    behind, backwards, titles = [], [], []
    for link, source, out, target, slot, _ in workflow["links"]:
        start = slot_point(nodes[source], out, is_output=True)
        end = slot_point(nodes[target], slot, is_output=False)
        if end[0] < start[0]:
            backwards.append(link)
        points = curve(start, end)
        for node in workflow["nodes"]:
            is_end = node["id"] in (source, target)
            if not is_end and any(_boxed(node, point) for point in points):
                behind.append((link, node["id"]))
        for group in workflow["groups"]:
            if any(_titled(group, point) for point in points):
                titles.append((link, group["title"]))
    return Faults(behind, backwards, titles)
