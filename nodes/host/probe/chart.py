"""Draws a record's chart with Pillow, which every host has, as an image of the host."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...probe.chart import PALETTE, STACK, areas_of, axis_of, height_of, marks_of, unit_of
from ...probe.record import Record
from ...probe.report import headline
from ...units import size

_WIDTH, _HEIGHT = 960, 420
_TOP, _BOTTOM, _LEFT, _RIGHT = 72, _HEIGHT - 34, 64, _WIDTH - 16
_TEXT_PX = 13
_GROUND, _INK, _ALARM = PALETTE["ground"], PALETTE["ink"], PALETTE["alarm"]
_FAINT = "#3a3d42"


def draw(record: Record) -> torch.Tensor:
    """Returns the chart of a record, [1, H, W, 3], float32 from 0 to 1."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _GROUND)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=_TEXT_PX)

    def write(x: float, y: float, text: str, anchor: str = "lm") -> None:
        pen.text((x, y), text, fill=_INK, font=font, anchor=anchor)

    write(16, 18, headline(record))
    left = 16.0
    for part, colour in STACK.items():
        pen.rectangle((left, 32, left + 10, 42), fill=colour)
        write(left + 16, 37, part)
        left += 38 + pen.textlength(part, font=font)
    if record.timeline and record.peak_bytes is not None:
        _plot(pen, write, record, record.peak_bytes)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]


def _plot(pen, write, record: Record, peak: int) -> None:
    axis = axis_of(record)
    start = record.timeline[0].t_s
    end = max(record.timeline[-1].t_s, start + 1e-3)

    def x(t_s: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (t_s - start) / (end - start)

    def y(count: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * height_of(count, axis)

    write(16, _TOP - 14, unit_of(axis.high))
    for count, label in marks_of(axis, _BOTTOM - _TOP):
        pen.line((_LEFT, y(count), _RIGHT, y(count)), fill=_FAINT)
        write(_LEFT - 8, y(count), label, "rm")
    for part, points in areas_of(record.timeline).items():
        pen.polygon([(x(t_s), y(count)) for t_s, count in points], fill=STACK[part])
    for step in record.steps:
        pen.line((x(step.start_s), _TOP, x(step.start_s), _BOTTOM), fill=_GROUND)
    if axis.low > 0:  # the zigzag where the axis is cut
        write(_LEFT - 8, _BOTTOM, "0", "rm")
        at = range(_LEFT - 4, _RIGHT + 1, 4)
        pen.line([(px, y(axis.low) + 2 * (-1) ** i) for i, px in enumerate(at)], _GROUND, width=3)
    ceiling = record.device.total_bytes
    if ceiling is not None:
        write(_RIGHT, 37, f"{record.device.name}: {size(ceiling)}", "rm")
        if axis.has_ceiling:
            pen.line((_LEFT, y(ceiling), _RIGHT, y(ceiling)), fill=_ALARM, width=2)
    pen.line((_LEFT, y(peak), _RIGHT, y(peak)), fill=_INK)
    write(_RIGHT, y(peak) - 9, f"peak {size(peak)}", "rm")
    write(_LEFT, _HEIGHT - 14, f"{start:.2f} s")
    write(_RIGHT, _HEIGHT - 14, f"{end:.2f} s", "rm")
