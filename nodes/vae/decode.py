"""The decode of a KL image VAE over strips of rows."""

from __future__ import annotations

import torch

from .layers import VaeLayers
from .maps import Rows, Whole
from .plan import VaePlan
from .ram import Ram
from .steps import RowsWriter, Steps, Tick


def decode(
    latent: torch.Tensor,
    layers: VaeLayers,
    plan: VaePlan,
    *,
    write: RowsWriter,
    tick: Tick,
    ram: Ram | None = None,
) -> None:
    """Decodes one latent.

    Args:
        latent: [1, C, H, W], float, in the dtype and on the device of the arithmetic.
        plan: what to store; its levels go from the smallest map to the picture.
        write: takes the rows of the picture.
        ram: for the maps that the plan keeps there; None: RAM that is not pinned.

    Memory: `lean_vae_peak_bytes`.
    Exact: equal up to rounding to the host's decoder. With `plan.is_fused`, sums of taps are
        rounded to the dtype before they are multiplied.
    """
    steps = Steps(plan.levels[0], tick, ram)
    source: Rows = steps.convolved(Whole(latent), layers.conv_in)
    source = steps.middle(source, layers)
    for number, level in enumerate(layers.levels):
        steps.level = plan.levels[number]
        is_stored = number == 0 or steps.level.keeps_input
        source, norm = steps.keep(source, level.blocks[0].norm1, is_stored=is_stored)
        source = steps.block(source, norm, level.blocks[0], is_first=True)
        source = steps.more_blocks(source, level.blocks[1:])
        if level.resample is not None:
            to = plan.levels[number + 1]
            if steps.level.keeps_output or not to.keeps_input:
                # It is read again: by overlapping strips, and for norms of what is recomputed.
                source = steps.store(source)
            source = steps.upsampled(source, level.resample, to, is_fused=plan.is_fused)
    source, norm = steps.keep(source, layers.norm_out, is_stored=steps.level.keeps_output)
    steps.write(steps.convolved(source, layers.conv_out, norm), write)
