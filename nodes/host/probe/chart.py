"""Draws a chart with Pillow, which every host has, into an image as the host passes it on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_TEXT_PX = 13


def draw(drawing: Any) -> torch.Tensor:
    """Draws the memory room's Drawing.

    Returns:
        [1, H, W, 3], float32 from 0 to 1.
    """
    image = Image.new("RGB", (drawing.width, drawing.height), drawing.background)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=_TEXT_PX)
    for shape in drawing.shapes:
        kind = type(shape).__name__
        if kind == "Area":
            pen.polygon(list(shape.points), fill=shape.colour)
        elif kind == "Line":
            pen.line([shape.start, shape.end], fill=shape.colour)
        else:
            anchor = "rm" if shape.is_right else "lm"
            pen.text(shape.at, shape.text, fill=shape.colour, font=font, anchor=anchor)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)[None]
