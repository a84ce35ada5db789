"""The peak of a decode or encode over strips as a formula, its arithmetic, and the stock's peak."""

from __future__ import annotations

from collections.abc import Iterator

from .plan import VaePlan, VaeSizes

# The same constants as in kernels/vae_work.py; a test compares them.
QUERY_ROWS = 4096
QUERY_PARTS = 8
# Rows that a strip may be longer than the plan's limit, and its halo.
SLACK_ROWS, HALO_ROWS = 2, 2
FUSED_TAPS, TAPS = 4, 9
FUSED_WEIGHTS = 16  # the sums of taps, for the four places of a pixel


def lean_vae_peak_bytes(
    sizes: VaeSizes, height: int, width: int, dtype_bytes: int, plan: VaePlan
) -> int:
    """The peak of one sample's decode or encode on a card, in bytes; the caller's tensors too.

    Kernel workspaces and weights are not in it, but the copies of weights in another layout are.
    """
    of_level = _level_elements if sizes.is_decoder else _encoder_level_elements
    peak = max(of_level(sizes, height, width, plan, level) for level in range(len(sizes.widths)))
    peak = max(peak, _middle_elements(sizes, height, width, plan))
    latent = height * width // sizes.factor**2 * sizes.latent_channels
    return dtype_bytes * (peak + latent + height * width * sizes.picture_channels)


def _level_elements(sizes: VaeSizes, height: int, width: int, plan: VaePlan, level: int) -> int:
    """Elements that a decoder's level holds: stored maps, a strip's maps beside, and weights."""
    how, scale = plan.levels[level], sizes.scale(level)
    rows, columns = -(-height // scale), -(-width // scale)
    channels, inputs = sizes.widths[level], sizes.inputs(level)
    # Elements of a row of what the first block reads, and of what each block gives.
    read, own = inputs * columns, channels * columns
    strip = _strip_rows(rows, how.limit)
    # What the level began with, where that lies on the card.
    is_below_in_ram = level == 0 or plan.levels[level - 1].in_ram
    ends = 0 if is_below_in_ram else rows * read // 4
    if not how.keeps_hidden:
        maps = rows * own if how.keeps_output else rows * read // 4
        # A strip as it was read, with its halo, and normed; later its hidden strip beside. While
        # it is at work, its place in the map is empty.
        made = max(3 * read, 4 * own) - own * how.keeps_output
        if how.in_ram:
            made += own * how.keeps_output  # no strip leaves a place empty on the card
            maps = ends
        held = made * strip + maps
    elif how.in_ram:
        held = ends + max(3 * read + own * (inputs != channels), 3 * own) * strip
    elif inputs != channels:  # the shortcut's strip beside
        held = max(rows * read, 2 * rows * own) + (2 * read + own) * strip
    else:
        held = 2 * rows * own + 2 * own * strip
    weights = TAPS * (inputs + channels) * channels
    if level and not how.keeps_input:
        weights += (FUSED_WEIGHTS if plan.is_fused else TAPS) * inputs**2
        # Made for its statistics it is fused in any case; the level's own map is not there yet.
        statistics = ends + 3 * read * strip
        statistics += FUSED_WEIGHTS * inputs**2 + TAPS * inputs * channels
        return max(held + weights, statistics)
    return held + weights


def _strip_rows(rows: int, limit: int) -> int:
    """A strip as even_runs cuts it, with the rows that a stage held back, and its halo."""
    parts = max(1, -(-(rows - SLACK_ROWS) // limit))
    return -(-rows // parts) + SLACK_ROWS + HALO_ROWS


def _encoder_level_elements(
    sizes: VaeSizes, height: int, width: int, plan: VaePlan, level: int
) -> int:
    """As `_level_elements`, of an encoder's level: the largest of what its steps hold."""
    how, scale = plan.levels[level], sizes.scale(level)
    rows, columns = height // scale, width // scale
    channels, inputs = sizes.widths[level], sizes.inputs(level)
    read, own = inputs * columns, channels * columns
    strip = _strip_rows(rows, how.limit)
    adds = level + 1 < len(sizes.widths) and sizes.blocks > 1 and how.adds_after
    stored = max(1, int(how.share * rows)) if level == 0 else rows
    # Beside a map whose strip is at work: it normed, and with its halo; of a block in one go, its
    # hidden strip too; and made anew, the strip itself.
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


def _middle_elements(sizes: VaeSizes, height: int, width: int, plan: VaePlan) -> int:
    channels = sizes.widths[0 if sizes.is_decoder else -1]
    tokens = height * width // sizes.factor**2
    part = min(tokens, max(QUERY_ROWS, -(-tokens // QUERY_PARTS)))
    return channels * (4 * tokens + 3 * part) + 4 * channels**2


def stock_vae_peak_bytes(sizes: VaeSizes, height: int, width: int, dtype_bytes: int) -> int:
    """The peak of the host's own decode or encode of one sample, without workspaces, in bytes.

    A decoder's stands at the first convolution of the picture's size: its input, that normed, and
    its output. An encoder's at the second convolution there: three maps.

    Source: ResnetBlock in the host's comfy/ldm/modules/diffusionmodules/model.py.
    """
    if sizes.is_decoder:
        maps = 2 * sizes.inputs(len(sizes.widths) - 1) + sizes.widths[-1]
    else:
        maps = 3 * sizes.widths[0]
    return dtype_bytes * height * width * (maps + sizes.picture_channels)


def vae_peak_bytes(
    sizes: VaeSizes, height: int, width: int, batch: int, dtype_bytes: int, plan: VaePlan | None
) -> int:
    """The peak of a batch's decode or encode, in bytes; a plan of None is the host's own.

    Over strips the samples come one after the other, and only latents and pictures of the others
    are held.
    """
    if plan is None:
        return batch * stock_vae_peak_bytes(sizes, height, width, dtype_bytes)
    ends = height * width * sizes.picture_channels
    ends += height * width // sizes.factor**2 * sizes.latent_channels
    one = lean_vae_peak_bytes(sizes, height, width, dtype_bytes, plan)
    return one + (batch - 1) * ends * dtype_bytes


def vae_parameters(sizes: VaeSizes) -> int:
    """Elements of all weights of a decoder or encoder."""

    def conv(inputs: int, outputs: int, taps: int = TAPS) -> int:
        return (taps * inputs + 1) * outputs

    def block(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * (inputs + outputs) + conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    lowest = sizes.widths[0 if sizes.is_decoder else -1]
    total = 2 * block(lowest, lowest) + 2 * lowest + 4 * conv(lowest, lowest, 1)
    total += conv(sizes.latent_channels, lowest) if sizes.is_decoder else 0
    total += 0 if sizes.is_decoder else conv(lowest, sizes.latent_channels)
    for level, own in enumerate(sizes.widths):
        inputs = sizes.inputs(level)
        total += block(inputs, own) + (sizes.blocks - 1) * block(own, own)
        total += conv(inputs, inputs) if level else 0  # the resampling before
    picture = sizes.widths[-1 if sizes.is_decoder else 0]
    total += 2 * (picture if sizes.is_decoder else lowest)
    if sizes.is_decoder:
        return total + conv(picture, sizes.picture_channels)
    return total + conv(sizes.picture_channels, picture)


def lean_vae_work(sizes: VaeSizes, height: int, width: int, plan: VaePlan) -> int:
    """Multiply-adds of one sample's convolutions and attention."""
    pixels = [
        (height // sizes.scale(level)) * (width // sizes.scale(level))
        for level in range(len(sizes.widths))
    ]
    smallest = 0 if sizes.is_decoder else -1
    tokens, lowest = pixels[smallest], sizes.widths[smallest]
    total = tokens * lowest * (4 * lowest + 2 * tokens)
    total += tokens * 2 * TAPS * lowest**2 * (2 if plan.levels[smallest].keeps_hidden else 3)
    for level, here in enumerate(pixels):
        if sizes.is_decoder:
            total += here * sum(_level_work(sizes, level, plan))
            continue
        total += here * sum(_encoder_level_work(sizes, level, plan))
        total += width * _made_anew(sizes, height, plan) * (level == 0)
        if plan.levels[level].adds_after and level + 1 < len(pixels):
            total += pixels[level + 1] * TAPS * sizes.widths[level] ** 2
    latent = TAPS * tokens * lowest * sizes.latent_channels
    # The picture's convolution is in its level's work: it may be computed more than once.
    return total + latent


def _level_work(sizes: VaeSizes, level: int, plan: VaePlan) -> Iterator[int]:
    """Multiply-adds per pixel of a decoder's level, convolution by convolution."""
    how, channels, inputs = plan.levels[level], sizes.widths[level], sizes.inputs(level)
    is_picture = sizes.scale(level) == 1
    to_picture = TAPS * channels * sizes.picture_channels
    # What makes the level's first map: for a reading that serves statistics, and for the last.
    again, last = 0, 0
    if level:
        last = inputs**2 * (FUSED_TAPS if plan.is_fused else TAPS)
        again = inputs**2 * FUSED_TAPS
    else:
        inputs = channels
    is_stored = how.keeps_input
    if is_stored:
        again = 0
        yield last
        last = 0
    for _ in range(sizes.blocks):
        first = TAPS * inputs * channels
        whole = first + TAPS * channels**2 + (inputs * channels if inputs != channels else 0)
        yield 0 if is_stored else again  # the first norm's statistics
        if how.keeps_hidden:
            yield again + last + whole
        else:
            yield again + first
            again, last = again + whole, last + whole
            if how.keeps_output:
                yield last
                again = last = 0
        is_stored, inputs = how.keeps_output, channels
        if how.keeps_hidden:
            again = last = 0
    if is_picture:
        yield 0 if how.keeps_output else again  # the last norm's statistics
        yield last + to_picture
    else:
        yield last


def _encoder_level_work(sizes: VaeSizes, level: int, plan: VaePlan) -> Iterator[int]:
    """Multiply-adds per pixel of an encoder's level, where all that is to be stored is."""
    how, channels, inputs = plan.levels[level], sizes.widths[level], sizes.inputs(level)
    if level:
        yield TAPS * inputs**2  # the downsampling before
    else:
        yield 3 * TAPS * channels * sizes.picture_channels  # the norm's statistics, then both parts
    for block in range(sizes.blocks):
        first = TAPS * inputs * channels
        yield first + TAPS * channels**2 + (inputs * channels if inputs != channels else 0)
        is_last = level + 1 < len(sizes.widths) and 0 < block == sizes.blocks - 1
        if not (how.keeps_hidden or (block == 0 == level) or (is_last and how.adds_after)):
            yield first
        inputs = channels


def _made_anew(sizes: VaeSizes, height: int, plan: VaePlan) -> int:
    """Multiply-adds per column for the rows of an encoder's first level that are not stored."""
    first, channels = plan.levels[0], sizes.widths[0]
    stored = max(1, int(first.share * height))
    if stored == height:
        return 0
    conv, conv_in = TAPS * channels**2, TAPS * channels * sizes.picture_channels
    # The rows above are a convolution's halo: made too, and dropped.
    above = [min(stored, halo) for halo in range(4)]
    rows = [height - stored + halo for halo in above]
    hidden = rows[1] * conv + rows[2] * conv_in
    block = rows[2] * 2 * conv + rows[3] * conv_in
    return hidden + 2 * block
