"""The decoder and encoder of the KL image VAEs over strips of rows.

What is stored in full and what is computed again is the plan's: see `vae_work`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .layers import LevelLayers, VaeLayers
from .maps import Remade, Rows, Whole
from .plan import VaePlan
from .strips import Tick
from .work import Work

# Takes the strips of the result in order, with their first row.
RowsWriter = Callable[[int, torch.Tensor], None]


def decode(
    latent: torch.Tensor,
    layers: VaeLayers,
    plan: VaePlan,
    *,
    device: torch.device,
    write: RowsWriter,
    tick: Tick,
) -> None:
    """Decodes one latent.

    Args:
        latent: [1, C, H, W], float, in the dtype of the arithmetic, on any device.
        layers: of the decoder.
        plan: what to store; its levels from the smallest map to the picture.
        device: where to compute.
        write: takes the rows of the picture.
        tick: see `Tick`.

    Memory: the formula is in nodes/vae/peak.py.
    Exact: equal up to rounding to the host's decoder; with `plan.is_fused`, sums of taps
        are rounded to the dtype before they are multiplied.
    """
    work = Work(plan.levels[0], tick)
    source: Rows = work.convolved(Whole(latent, device), layers.conv_in)
    source = _middle(work, source, layers)
    for number, level in enumerate(layers.levels):
        work.level = plan.levels[number]
        is_stored = number == 0 or work.level.keeps_input
        source, norm = work.keep(source, level.blocks[0].norm1, is_stored=is_stored)
        source = work.blocks(source, norm, level.blocks)
        if level.resample is not None:
            if not plan.levels[number + 1].keeps_input:
                source = work.store(source)  # read once per norm of what is made of it
            source = work.upsampled(source, level.resample, is_fused=plan.is_fused)
    source, norm = work.keep(source, layers.norm_out, is_stored=work.level.keeps_output)
    _write(work, work.convolved(source, layers.conv_out, norm), write)


def encode(
    picture: torch.Tensor,
    layers: VaeLayers,
    plan: VaePlan,
    *,
    device: torch.device,
    write: RowsWriter,
    tick: Tick,
) -> None:
    """Encodes one picture to the moments of its latent.

    Args:
        picture: [1, C, H, W], float, in the dtype of the arithmetic, on any device.
        layers: of the encoder.
        plan: what to store; its levels from the picture to the smallest map.
        device: where to compute.
        write: takes the rows of the moments.
        tick: see `Tick`.

    Memory: the formula is in nodes/vae/peak.py.
    Exact: equal up to rounding to the host's encoder.
    """
    work = Work(plan.levels[0], tick)
    made = work.convolved(Whole(picture, device), layers.conv_in)
    source = _encoder_level(work, made, layers.levels[0], made)
    for number, level in enumerate(layers.levels[1:], 1):
        work.level = plan.levels[number]
        source = _encoder_level(work, source, level, None)
    source = _middle(work, source, layers)
    source, norm = work.keep(source, layers.norm_out, is_stored=True)
    _write(work, work.convolved(source, layers.conv_out, norm), write)


def _encoder_level(work: Work, source: Rows, level: LevelLayers, made: Remade | None) -> Rows:
    """A level and the downsampling behind; `made` is the source where it is made of the picture."""
    first, *others = level.blocks
    # Of 3 channels: cheaper to make again than to keep.
    source, norm = work.keep(source, first.norm1, is_stored=made is None)
    source = (
        work.block(source, norm, first) if made is None else work.first_block(made, norm, first)
    )
    last = others.pop() if others and level.resample and work.level.adds_after else None
    source = work.more_blocks(source, others)
    if level.resample is None:
        return source
    if last is None:
        return work.downsampled(source, level.resample)
    source, norm = work.keep(source, last.norm1, is_stored=True)
    return work.downsampled_sum(source, norm, last, level.resample)


def _middle(work: Work, source: Rows, layers: VaeLayers) -> Rows:
    first, attention, last = layers.middle
    source, norm = work.keep(source, first.norm1, is_stored=True)
    source, norm = work.keep(work.block(source, norm, first), attention.norm, is_stored=True)
    source = work.attended(source, norm, attention)
    return work.block(source, work.pool(source, last.norm1), last)


def _write(work: Work, source: Rows, write: RowsWriter) -> None:
    first = 0
    for rows in source.read(work.level.limit, drain=True):
        write(first, rows)
        first += rows.shape[2]
        del rows
