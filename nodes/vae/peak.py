"""The peak of a decode or encode as a formula: over strips, and of the host's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .cuts import HALO_ROWS, query_rows, strip_rows, strips
from .sizes import LevelPlan, VaeCall, VaePlan, VaeSizes

TAPS = 9
FUSED_TAPS = 16  # sums of taps: four for each of the four pixels that one becomes
HALF_FUSED_TAPS = 12  # summed along one side, in float32
# Strips that a map in RAM takes beside itself: one is read in runs and kept until the last, and
# one does not fit the ring's end. A strip that comes is no longer than what was read for it.
RAM_STRIPS = 2


def lean_vae_peak_bytes(call: VaeCall, plan: VaePlan) -> int:
    """The peak of one sample's decode or encode on a card, in bytes.

    Includes the caller's tensors, and the copies of weights in another layout. Kernel workspaces
    and the weights themselves are not included, except for what unrolled convolutions copy.
    """
    levels = (level_elements(call, plan.levels, level) for level in range(len(plan.levels)))
    return call.dtype_bytes * (max(middle_elements(call), *levels) + end_elements(call))


def lean_vae_ram_bytes(call: VaeCall, plan: VaePlan) -> int:
    """The most RAM that one sample's maps take at a time, in bytes; 0 where none waits there."""
    peak = 0
    for level, how in enumerate(plan.levels):
        if how.in_ram:
            rows, columns = call.sides(level)
            # A map takes the room of the one it is made of, behind what was read.
            strip = max(strip_rows(rows, how.limit), strip_rows(rows, how.later))
            peak = max(peak, (rows + RAM_STRIPS * strip) * columns * call.sizes.widths[level])
    return call.dtype_bytes * peak


def end_elements(call: VaeCall) -> int:
    """Elements of the latent and the picture."""
    pixels = call.height * call.width
    latent = pixels // call.sizes.factor**2 * call.sizes.latent_channels
    return latent + pixels * call.sizes.picture_channels


def level_elements(call: VaeCall, levels: Sequence[LevelPlan], level: int) -> int:
    """Elements that a level holds: stored maps, the maps of one strip, and weights."""
    steps = _decoder_steps if call.sizes.is_decoder else _encoder_steps
    return max(steps(call, levels, level))


def _decoder_steps(call: VaeCall, levels: Sequence[LevelPlan], level: int) -> Iterator[int]:
    """Elements that each step of a decoder's level holds."""
    sizes, how = call.sizes, levels[level]
    rows, columns = call.sides(level)
    channels, inputs = sizes.widths[level], sizes.inputs(level)
    # Elements of a row: of the first block's input, and of each block's output.
    read, own = inputs * columns, channels * columns
    strip, later = _longest(rows, how.limit), _longest(rows, how.later)
    taps = TAPS if call.is_unrolled else 0  # copies of a strip
    # What the level began with, if it is on the card; and what of it is read with the last strip.
    ends = 0 if level == 0 or levels[level - 1].in_ram else rows * read // 4
    rest = 0 if level == 0 else read // 4
    is_fused = call.dtype_bytes == 4
    up = (FUSED_TAPS if is_fused else TAPS) * inputs**2
    first, other = TAPS * inputs * channels, TAPS * channels**2
    if level and (is_fused or not how.keeps_input):  # while the sums of taps are made
        yield ends + (FUSED_TAPS + HALF_FUSED_TAPS * 4 // call.dtype_bytes) * inputs**2
    if how.keeps_input:
        if level:
            yield rows * read + (read + 2 * rest + taps * read) * strip + up
    else:
        # Read for statistics, the upsampling is always fused; the level's own map is not made yet.
        yield ends + (read + max(own, rest) + taps * read) * later + FUSED_TAPS * inputs**2 + first
    if how.keeps_hidden:
        kept = 0 if how.in_ram else 2 * rows * own
        if inputs != channels:  # one strip, normed, and its shortcut
            source = 0 if how.in_ram else max(rows * read, kept)
            yield source + (read + own + taps * read) * strip + first
        # A strip with its halo, normed, and what is made of it; of one strip, that is kept.
        work = 3 * own if how.in_ram else own + own * (later < rows)
        yield kept + (work + taps * own) * later + other
        if later < strip and not how.in_ram:
            # Of a longer strip that is read in parts, a half is held, and copied to let it go.
            yield kept + own * strip + other
        return
    # A strip upsampled and convolved; or convolved, its shortcut, and the hidden strip.
    work = max(2 * read, read + 2 * own) if level and not how.keeps_input else 3 * own
    weights = first + other + (0 if how.keeps_input else up)
    if not how.keeps_output:
        # Nothing is normed in place, as a few rows of each map are kept for the next strip.
        work = max(2 * read + rest, 2 * (read + own))
        yield ends + (work + taps * read) * max(strip, later) + weights
        return
    yield ends + (work + taps * read) * strip + weights
    if how.in_ram:
        yield (3 * own + taps * own) * later + 2 * other
        return
    # While it is at work, a strip's place in the map is empty.
    work = max(work, rest + 2 * read) if level and not how.keeps_input else work
    yield rows * own + (work - own + taps * read) * strip + weights
    # Of a shorter strip that is read in part, up to half is held.
    part = strip // 2 if strip < later else 0
    yield rows * own + (2 * own + taps * own) * later + part * own + 2 * other


def _longest(rows: int, limit: int) -> int:
    """Rows of the longest strip, with what two convolutions read above and below it."""
    return min(rows, strip_rows(rows, limit) + 2 * HALO_ROWS)


def _encoder_steps(call: VaeCall, levels: Sequence[LevelPlan], level: int) -> Iterator[int]:
    """As `_decoder_steps`, for an encoder's level."""
    sizes, how = call.sizes, levels[level]
    rows, columns = call.sides(level)
    channels, inputs = sizes.widths[level], sizes.inputs(level)
    read, own = inputs * columns, channels * columns
    strip = max(_longest(rows, how.limit), _longest(rows, how.later))
    taps = TAPS * max(read, own) if call.is_unrolled else 0
    adds = level + 1 < len(sizes.widths) and sizes.blocks > 1 and how.adds_after
    stored = max(1, int(how.share * rows)) if level == 0 else rows
    weights = TAPS * (inputs + channels) * channels + taps * strip
    # A strip of the blocks' maps: the normed one, what is made of it, what is added to that.
    one, kept = own * strip, stored * own
    if level == 0:
        yield kept + (1 + (stored < rows)) * one + weights
        yield kept + 5 * one // 2 + weights
    elif how.keeps_hidden:
        yield rows * (own + read) + 2 * one + weights
    else:
        yield kept + 3 * one + weights
    both = 2 * TAPS * channels**2 + taps * strip
    halved = own * _halved_rows(rows, how) if level + 1 < len(sizes.widths) else 0
    if adds:
        yield kept + kept // 4 + max(one, halved) + both
    elif how.keeps_hidden:
        # The hidden map is made; then the sum of both is read, downsampled.
        yield 2 * rows * own + (1 + (strip < rows)) * one + TAPS * channels**2 + taps * strip
        yield 2 * rows * own + (halved if strip < rows else one) + both
    else:
        yield kept + 3 * one + weights


def _halved_rows(rows: int, how: LevelPlan) -> int:
    """Rows of a map that downsampling its first strip takes beside it.

    The strip, that with its zeros, and the result. What only that strip needs is free before.
    """
    count = strips(rows // 2, max(1, how.later // 2))[0][1]
    first = strips(rows, how.limit)[0][1]
    return 4 * count + 3 + count // 2 - (first if first <= 2 * count else 0)


def middle_elements(call: VaeCall) -> int:
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
    others = (batch - 1) * end_elements(call) * call.dtype_bytes
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
