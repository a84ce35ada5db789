"""The encode of a KL image VAE over strips of rows."""

from __future__ import annotations

import torch

from .layers import LevelLayers, VaeLayers
from .maps import Rows, Whole
from .plan import VaePlan
from .ram import Ram
from .steps import RowsWriter, Steps, Tick


def encode(
    picture: torch.Tensor,
    layers: VaeLayers,
    plan: VaePlan,
    *,
    write: RowsWriter,
    tick: Tick,
    ram: Ram | None = None,
) -> None:
    """Encodes one picture to the moments of its latent.

    Args:
        picture: [1, C, H, W], float, in the dtype and on the device of the arithmetic.
        plan: what to store; its levels go from the picture to the smallest map.
        write: takes the rows of the moments.
        ram: for the maps that the plan keeps there; None: RAM that is not pinned.

    Memory: `lean_vae_peak_bytes`.
    Exact: equal up to rounding to the host's encoder.
    """
    steps = Steps(plan.levels[0], tick, ram)
    made = steps.convolved(Whole(picture), layers.conv_in)
    # Made of 3 channels, it is cheaper to recompute than to keep.
    first = layers.levels[0].blocks[0]
    source, norm = steps.keep(made, first.norm1, is_stored=False)
    source = steps.first_block(made, norm, first)
    source = _rest_of_level(steps, source, layers.levels[0])
    for number, level in enumerate(layers.levels[1:], 1):
        steps.level = plan.levels[number]
        source, norm = steps.keep(source, level.blocks[0].norm1)
        source = steps.block(source, norm, level.blocks[0], is_first=True)
        source = _rest_of_level(steps, source, level)
    source = steps.middle(source, layers)
    source, norm = steps.keep(source, layers.norm_out)
    steps.write(steps.convolved(source, layers.conv_out, norm), write)


def _rest_of_level(steps: Steps, source: Rows, level: LevelLayers) -> Rows:
    """The blocks after the first, and the downsampling."""
    others = list(level.blocks[1:])
    last = others.pop() if others and level.resample and steps.level.adds_after else None
    source = steps.more_blocks(source, others)
    if level.resample is None:
        return source
    if last is None:
        return steps.downsampled(source, level.resample)
    source, norm = steps.keep(source, last.norm1)
    return steps.downsampled_sum(source, norm, last, level.resample)
