"""Convolutions of a U-Net's maps by strips of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from ..cuts import pieces
from .unet_cuts import strip_rows

# Writes rows first:last of the convolution's input into a tensor [C, last - first, W].
WriteFn = Callable[[int, int, torch.Tensor], object]
# Convolves [1, C_in, H + 2, W] with padding at the left and the right alone: [1, C_out, H, W].
ConvolveFn = Callable[[torch.Tensor], torch.Tensor]

# Into how many slices of channels a group norm is cut, at most.
SLICES = 8


def convolve_strips(
    write: WriteFn,
    channels: int,
    into: torch.Tensor,
    convolve: ConvolveFn,
    *,
    strips: int,
) -> None:
    """into = the 3 x 3 convolution of a map that exists a strip at a time, zeros around it.

    Args:
        write: makes rows of the map.
        channels: of the map, C_in.
        into: [C_out, H, W], float; the map has its height and width.
        strips: into how many strips of rows the map is cut, at most.

    Raises:
        ValueError: strips < 1.

    Memory: a strip of the map, with a row more at each side, and its convolution.
    Exact: bit-exact on CPU.
    """
    _, height, width = into.shape
    for start, stop in strip_rows(height, width, strips):
        low, high = max(0, start - 1), min(height, stop + 1)
        strip = into.new_empty(1, channels, stop - start + 2, width)
        first = low - (start - 1)
        strip[:, :, :first].zero_()
        strip[:, :, first + high - low :].zero_()
        write(low, high, strip[0, :, first : first + high - low])
        made = convolve(strip)
        del strip
        into[:, start:stop] = made[0]
        del made  # before the next strip


def write_normed(
    source: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    first: int,
    last: int,
    into: torch.Tensor,
) -> None:
    """into = silu of rows first:last of the group norm of a map, some groups at a time.

    The groups are normed whole for each call, by torch's own kernel: other sums would change bits.

    Args:
        source: [C, H, W], float.
        weight, bias: [C].
        into: [C, last - first, W].

    Memory: an eighth of the map.
    Exact: bit-exact (groups are independent).
    """
    each = source.shape[0] // groups
    for begin, end in pieces(groups, -(-groups // SLICES)):
        here = slice(begin * each, end * each)
        of_slice = {
            name: None if factors is None else factors[here]
            for name, factors in (("weight", weight), ("bias", bias))
        }
        normed = functional.group_norm(source[None, here], end - begin, **of_slice, eps=epsilon)
        # Of whole slices: the CPU computes the end of a run that is no multiple of its vectors
        # with another function.
        into[here] = functional.silu(normed, inplace=True)[0, :, first:last]
        del normed


def write_upsampled(source: torch.Tensor, first: int, last: int, into: torch.Tensor) -> None:
    """into = rows first:last of a map whose rows and columns are doubled.

    Torch's nearest pixels of one row or column less are those without the last one.

    Args:
        source: [C, H, W].
        into: [C, last - first, 2 W or 2 W - 1].

    Memory: 0.
    Exact: bit-exact.
    """
    even = into.shape[2] // 2
    pairs = into[:, :, : 2 * even].unflatten(2, (-1, 2))
    for parity in (0, 1):  # rows of one parity are neighbours in the source
        begin = first + (first + parity) % 2
        rows = source[:, begin // 2 : (last + 1 - parity) // 2] if begin < last else source[:, :0]
        pairs[:, begin - first :: 2].copy_(rows[..., :even, None])
        if into.shape[2] % 2:
            into[:, begin - first :: 2, -1] = rows[..., -1]
