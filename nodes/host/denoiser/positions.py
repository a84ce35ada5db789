"""The rotary table of a request's tokens, from the positions that the host gives them.

Source: embed_cap, embed_all and pos_ids_x of the host's comfy/ldm/lumina/model.py.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.ldm.lumina.model as lumina
import torch
from comfy.ldm.flux.math import rope

from .heads import RopeFn
from .sequence import Layout, Part


def rope_table(
    model: Any, device: torch.device, layout: Layout, transformer_options: dict[str, Any]
) -> RopeFn:
    """The rotary table of a run of tokens, gathered from one table per axis.

    The positions of a picture are a grid, so each axis has few distinct ones. The tables are cut
    into units of one length, so that one gather makes all of a token's row.

    Memory: per axis its positions * axis_dim * 8 bytes; per token an index of 4 bytes a unit.
    Exact: bit-exact, the host's own function makes the tables.
    """
    # Index 0 is position zero: text has it on the two picture axes, padding on all three.
    zero = torch.zeros(1, dtype=torch.float32, device=device)
    positions = [[zero], [zero], [zero]]
    index = torch.zeros(3, layout.tokens, dtype=torch.int32, device=device)

    def add(axis: int, found: torch.Tensor, repeated: int, tiled: int, first: int) -> None:
        """Gives each token of a run its place in the table of an axis."""
        begin = sum(map(len, positions[axis]))
        positions[axis].append(found)
        places = torch.arange(begin, begin + len(found), device=device)
        places = places.repeat_interleave(repeated) if repeated > 1 else places
        places = places.repeat(tiled) if tiled > 1 else places
        index[axis, first : first + len(places)] = places

    first = 0
    for part in layout.texts:  # padding counts on
        steps = torch.arange(part.tokens, dtype=torch.float32, device=device) + 1.0 + part.start
        add(0, steps, 1, 1, first)
        first += part.tokens
    kinds = ((layout.features, _feature_axes), (layout.pictures, _picture_axes))
    for part, axes_of in ((part, axes_of) for parts, axes_of in kinds for part in parts):
        if part.filled:
            axes = axes_of(part, device, transformer_options)
            add(0, axes[0], part.filled, 1, first)
            add(1, axes[1], part.columns, 1, first)
            add(2, axes[2], 1, part.rows, first)
        first += part.tokens
    return _gathered(model, [torch.cat(found) for found in positions], index)


def _picture_axes(
    part: Part, device: torch.device, transformer_options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of a picture on each axis: one, its rows, its columns."""
    sizes = part.start, part.rows, part.columns
    grid = lumina.pos_ids_x(*sizes, 1, device, transformer_options)[0]
    return grid[:1, 0], grid[:: part.columns, 1], grid[: part.columns, 2]


def _feature_axes(
    part: Part, device: torch.device, transformer_options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of a reference's features on each axis: spread over its picture's pixels."""
    start = torch.full((1,), float(part.start), device=device)
    rows, columns = (
        torch.linspace(0, count * 8 - 1, steps=count, dtype=torch.float32, device=device).floor()
        for count in (part.rows, part.columns)
    )
    return start, rows, columns


def _gathered(model: Any, positions: list[torch.Tensor], index: torch.Tensor) -> RopeFn:
    """The table of a run of tokens. index: of each token in the positions of each axis, [3, T]."""
    embedder = model.rope_embedder
    pairs = [dim // 2 for dim in embedder.axes_dim]
    unit = math.gcd(*pairs)
    # [P, dim / 2, 2, 2] per axis -> [P * units, unit * 4]
    tables = torch.cat(
        [
            rope(position[None], dim, embedder.theta)[0].reshape(-1, unit * 4)
            for position, dim in zip(positions, embedder.axes_dim, strict=True)
        ]
    )
    begin, of_axes = 0, []
    for axis, (position, count) in enumerate(zip(positions, pairs, strict=True)):
        units = count // unit
        of_unit = torch.arange(units, dtype=torch.int32, device=index.device) + begin
        of_axes.append(index[axis, :, None] * units + of_unit)
        begin += len(position) * units
    units = torch.cat(of_axes, dim=1)  # [T, units of a token]

    def gather(start: int, stop: int) -> torch.Tensor:
        rows = tables.index_select(0, units[start:stop].flatten())
        return rows.view(1, stop - start, 1, -1, 2, 2)

    return gather
