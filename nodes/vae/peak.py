"""The peak of a decode or encode as a formula: over strips, and of the host's own."""

from __future__ import annotations

from .cuts import HALO_ROWS, longest_strip, query_rows
from .plan import VaeCall, VaePlan, VaeSizes

TAPS = 9
FUSED_TAPS = 16  # sums of taps: four for each of the four pixels that one becomes
# Strips that a map in RAM takes beside itself: one is read in runs and kept until the last, and
# one does not fit the ring's end. A strip that comes is no longer than what was read for it.
RAM_STRIPS = 2


def lean_vae_peak_bytes(call: VaeCall, plan: VaePlan) -> int:
    """The peak of one sample's decode or encode on a card, in bytes.

    Includes the caller's tensors, and the copies of weights in another layout. Kernel workspaces
    and the weights themselves are not included, except for what unrolled convolutions copy.
    """
    of_level = _level_elements if call.sizes.is_decoder else _encoder_level_elements
    peak = max(
        of_level(call, plan, level) + _unrolled_elements(call, plan, level)
        for level in range(len(plan.levels))
    )
    return call.dtype_bytes * (max(peak, _middle_elements(call)) + _end_elements(call))


def lean_vae_ram_bytes(call: VaeCall, plan: VaePlan) -> int:
    """The most RAM that one sample's maps take at a time, in bytes; 0 where none waits there."""
    peak = 0
    for level, how in enumerate(plan.levels):
        if how.in_ram:
            scale = call.sizes.scale(level)
            rows, columns = -(-call.height // scale), -(-call.width // scale)
            # A map takes the room of the one it is made of, behind what was read.
            held = rows + RAM_STRIPS * longest_strip(rows, how.limit)
            peak = max(peak, held * columns * call.sizes.widths[level])
    return call.dtype_bytes * peak


def _unrolled_elements(call: VaeCall, plan: VaePlan, level: int) -> int:
    """Elements of one strip's copies for the taps of a convolution, where there are such copies."""
    if not call.is_unrolled:
        return 0
    sizes, scale = call.sizes, call.sizes.scale(level)
    rows, columns = -(-call.height // scale), -(-call.width // scale)
    made = min(rows, longest_strip(rows, plan.levels[level].limit) - HALO_ROWS)
    return TAPS * max(sizes.inputs(level), sizes.widths[level]) * made * columns


def _end_elements(call: VaeCall) -> int:
    """Elements of the latent and the picture."""
    pixels = call.height * call.width
    latent = pixels // call.sizes.factor**2 * call.sizes.latent_channels
    return latent + pixels * call.sizes.picture_channels


def _level_elements(call: VaeCall, plan: VaePlan, level: int) -> int:
    """Elements that a decoder's level holds: stored maps, the maps of one strip, and weights."""
    sizes, how, scale = call.sizes, plan.levels[level], call.sizes.scale(level)
    rows, columns = -(-call.height // scale), -(-call.width // scale)
    channels, inputs = sizes.widths[level], sizes.inputs(level)
    # Elements of a row: of the first block's input, and of each block's output.
    read, own = inputs * columns, channels * columns
    strip = longest_strip(rows, how.limit)
    # What the level began with, if it is on the card.
    is_below_in_ram = level == 0 or plan.levels[level - 1].in_ram
    ends = 0 if is_below_in_ram else rows * read // 4
    if not how.keeps_hidden:
        maps = rows * own if how.keeps_output else rows * read // 4
        # A strip as it was read, with its halo, and normed; later with its hidden strip. While it
        # is at work, its place in the map is empty.
        made = max(3 * read, 4 * own) - own * how.keeps_output
        if how.in_ram:
            made += own * how.keeps_output  # the map has no place on the card that is empty
            maps = ends
        held = made * strip + maps
    elif how.in_ram:
        held = ends + max(3 * read + own * (inputs != channels), 3 * own) * strip
    elif inputs != channels:  # with the shortcut's strip
        held = max(rows * read, 2 * rows * own) + (2 * read + own) * strip
    else:
        held = 2 * rows * own + 2 * own * strip
    weights = TAPS * (inputs + channels) * channels
    if level and not how.keeps_input:
        weights += (FUSED_TAPS if plan.is_fused else TAPS) * inputs**2
        # Read for statistics, the upsampling is always fused; the level's own map is not made yet.
        statistics = ends + 3 * read * strip
        statistics += FUSED_TAPS * inputs**2 + TAPS * inputs * channels
        return max(held + weights, statistics)
    return held + weights


def _encoder_level_elements(call: VaeCall, plan: VaePlan, level: int) -> int:
    """As `_level_elements`, for an encoder's level: the most that one of its steps holds."""
    sizes, how, scale = call.sizes, plan.levels[level], call.sizes.scale(level)
    rows, columns = call.height // scale, call.width // scale
    channels, inputs = sizes.widths[level], sizes.inputs(level)
    read, own = inputs * columns, channels * columns
    strip = longest_strip(rows, how.limit)
    adds = level + 1 < len(sizes.widths) and sizes.blocks > 1 and how.adds_after
    stored = max(1, int(how.share * rows)) if level == 0 else rows
    # What one strip adds to the map: itself normed and with its halo; in a block that stores no
    # hidden map, its hidden strip too; and where it is recomputed, the strip itself.
    one, two = 2 * strip * own, 3 * strip * own
    if level == 0:
        steps = [stored * own + (two + strip * own if stored < rows else one)]
    elif how.keeps_hidden:
        steps = [rows * (own + read) + one]
    else:
        steps = [rows * own + two]
    if adds:
        steps.append(rows * (own + own // 4) + one)
    elif how.keeps_hidden:
        steps.append(2 * rows * own + one)
    else:
        steps.append(stored * own + two)
    return max(steps) + TAPS * (inputs + channels) * channels


def _middle_elements(call: VaeCall) -> int:
    """Elements of the attention; where it is not fused, scores take the room of some queries."""
    channels = call.sizes.widths[0 if call.sizes.is_decoder else -1]
    tokens = call.height * call.width // call.sizes.factor**2
    return channels * (4 * tokens + 3 * query_rows(tokens)) + 4 * channels**2


def stock_vae_peak_bytes(call: VaeCall, batch: int = 1) -> int:
    """The peak of the host's own decode or encode of a batch, without workspaces, in bytes.

    A decoder's is at the first convolution of the picture's size: its input, that normed, and its
    output. An encoder's is at the second convolution of that size: three maps.

    Source: ResnetBlock in the host's comfy/ldm/modules/diffusionmodules/model.py.
    """
    sizes = call.sizes
    if sizes.is_decoder:
        given = sizes.inputs(len(sizes.widths) - 1)
        maps = 2 * given + sizes.widths[-1]
    else:
        given = sizes.widths[0]
        maps = 3 * given
    maps = batch * (maps + sizes.picture_channels)
    unrolled = TAPS * given if call.is_unrolled else 0  # for one sample after the other
    return call.dtype_bytes * call.height * call.width * (maps + unrolled)


def vae_peak_bytes(call: VaeCall, batch: int, plan: VaePlan | None) -> int:
    """The peak of a batch's decode or encode, in bytes; a plan of None means the host's own.

    Over strips the samples run one after the other. Of the others, only the latents and pictures
    are held.
    """
    if plan is None:
        return stock_vae_peak_bytes(call, batch)
    others = (batch - 1) * _end_elements(call) * call.dtype_bytes
    return lean_vae_peak_bytes(call, plan) + others


def vae_parameters(sizes: VaeSizes) -> int:
    """Elements of all weights of a decoder or encoder."""

    def conv(inputs: int, outputs: int, taps: int = TAPS) -> int:
        return (taps * inputs + 1) * outputs

    def block(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * (inputs + outputs) + conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    ends = sizes.latent_channels, sizes.picture_channels
    given, result = ends if sizes.is_decoder else ends[::-1]
    first, last = sizes.widths[0], sizes.widths[-1]
    total = conv(given, first) + 2 * last + conv(last, result)
    lowest = first if sizes.is_decoder else last
    total += 2 * block(lowest, lowest) + 2 * lowest + 4 * conv(lowest, lowest, 1)
    for level, own in enumerate(sizes.widths):
        inputs = sizes.inputs(level)
        total += block(inputs, own) + (sizes.blocks - 1) * block(own, own)
        total += conv(inputs, inputs) if level else 0  # the resampling before
    return total
