"""Takes pictures of nodes in the real page, and keeps them small."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pack.tests.e2e.page import ComfyPage
from PIL import Image

MARGIN_PX = 16
# Where the graph begins: clear of the page's bars at the left and above.
CORNER = (120, 160)
SPARE = (220, 260)  # what the page covers, in all
COLOURS = 256
MAX_FRAMES = 24
THUMBNAIL_PX = 512

MOVE_VIEW = """([left, top, zoom, x, y]) => { const {ds, canvas} = app.canvas;
    const view = canvas.getBoundingClientRect();
    ds.scale = zoom;
    ds.offset = [(x - view.left) / zoom - left, (y - view.top) / zoom - top];
    app.canvas.setDirty(true, true) }"""
BOUNDS = """ids => { const boxes = ids.map(id => app.graph.getNodeById(id).boundingRect);
    if (ids.length > 1) boxes.push(...app.graph.groups.map(group => group.boundingRect ??
        [...group.pos, ...group.size]));
    return [Math.min(...boxes.map(b => b[0])), Math.min(...boxes.map(b => b[1])),
        Math.max(...boxes.map(b => b[0] + b[2])), Math.max(...boxes.map(b => b[1] + b[3]))] }"""


class Camera:
    """Looks at some nodes of the open page at one zoom, from the same place in every picture.

    Args:
        node_ids: what to show; of more than one node, the groups of the graph too.
        zoom: 1 is 100 %.
    """

    def __init__(self, page: ComfyPage, node_ids: Sequence[int], *, zoom: float = 1.0):
        self.page = page
        ids = list(node_ids)
        left, top, right, bottom = page.page.evaluate(BOUNDS, ids)
        width, height = (right - left) * zoom, (bottom - top) * zoom
        page.page.set_viewport_size(
            {"width": max(1200, round(width) + SPARE[0]), "height": round(height) + SPARE[1]}
        )
        page.settle()
        page.page.evaluate(MOVE_VIEW, [left, top, zoom, *CORNER])
        page.page.mouse.move(5, 5)
        page.settle()
        self._clip = {
            "x": CORNER[0] - MARGIN_PX,
            "y": CORNER[1] - MARGIN_PX,
            "width": width + 2 * MARGIN_PX,
            "height": height + 2 * MARGIN_PX,
        }

    def take(self) -> Image.Image:
        """What the page shows of them now, RGB."""
        png = self.page.page.screenshot(clip=self._clip)
        return Image.open(io.BytesIO(png)).convert("RGB")


def save_png(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _few_colours(picture).save(path, optimize=True)


def save_thumbnail(picture: Image.Image, path: Path) -> None:
    """A JPEG for the page's list of templates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = (THUMBNAIL_PX, round(THUMBNAIL_PX * picture.height / picture.width))
    picture.resize(size, Image.Resampling.LANCZOS).save(path, quality=88)


def save_gif(frames: Sequence[Image.Image], path: Path, *, frame_ms: int, last_ms: int) -> None:
    """An endless animation of at most 24 frames; equal ones in a row become one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept: list[Image.Image] = []
    for frame in frames:
        if not kept or frame.tobytes() != kept[-1].tobytes():
            kept.append(frame)
    if len(kept) > MAX_FRAMES:  # the first and the last among them
        step = (len(kept) - 1) / (MAX_FRAMES - 1)
        kept = [kept[round(number * step)] for number in range(MAX_FRAMES)]
    # One palette for all, of all: else colours jump.
    tall = Image.new("RGB", (kept[0].width, sum(frame.height for frame in kept)))
    for number, frame in enumerate(kept):
        tall.paste(frame, (0, number * frame.height))
    palette = _few_colours(tall)
    reduced = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in kept]
    durations: Any = [frame_ms] * (len(kept) - 1) + [last_ms]
    reduced[0].save(
        path, save_all=True, append_images=reduced[1:], duration=durations, loop=0, optimize=True
    )


def _few_colours(picture: Image.Image) -> Image.Image:
    # Maximum coverage: the others merge a bar's colour, of few pixels, into another one.
    return picture.quantize(
        COLOURS, method=Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE
    )
