"""Up- and downsampling over strips of rows, each one stage with its convolution."""

from __future__ import annotations

import torch
from torch.nn import functional

from .devices import layout
from .strips import ReadFn, convolved, joined, kept


class UpConv:
    """Nearest upsampling by 2, then a 3 x 3 convolution.

    Through the 3 x 3 taps, each of the four pixels of a 2 x 2 square sees only 2 x 2 different
    pixels. So the pair equals one transposed convolution of stride 2, whose 4 x 4 weight holds sums
    of taps: 4 multiply-adds per pixel and channel pair instead of 9.

    Args:
        weight: [C_out, C_in, 3, 3], float.
        bias: [C_out], float, or None.
        height: rows of the map before.
        is_fused: runs as a transposed convolution; otherwise the upsampled strip is made.

    Memory: a call holds its input, its output and, unless fused, the upsampled strip.
    Exact: equal up to rounding; fused, sums of taps are rounded to the dtype.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        height: int,
        is_fused: bool,
    ) -> None:
        weight = upsampling_weight(weight) if is_fused else weight
        self._weight = weight.contiguous(memory_format=layout(weight.device))
        self._bias, self._is_fused, self._height = bias, is_fused, 2 * height

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor:
        # Rows that the convolution reads, and the rows before upsampling that they come from.
        above, below = max(first - 1, 0), min(last + 1, self._height)
        start, stop = above // 2, (below + 1) // 2
        keep = kept(keep, 1, self._height)
        window = joined(read(start, stop, keep // 2))
        if self._is_fused:
            # A larger padding leaves out rows at both ends, without their arithmetic.
            left_out = min(first - 2 * start, 2 * stop - last)
            made = functional.conv_transpose2d(
                window, self._weight, self._bias, stride=2, padding=(1 + left_out, 1)
            )
            begin = first - 2 * start - left_out
            return made[:, :, begin : begin + last - first]
        window = functional.interpolate(window, scale_factor=2.0, mode="nearest")
        window = window[:, :, above - 2 * start : below - 2 * start]
        return convolved(
            window, self._weight, self._bias, is_above=first > 0, is_below=last < self._height
        )


def upsampling_weight(weight: torch.Tensor) -> torch.Tensor:
    """The transposed convolution's weight of nearest upsampling by 2 and a 3 x 3 convolution.

    Args:
        weight: [C_out, C_in, 3, 3], float.

    Returns:
        [C_in, C_out, 4, 4] of the same dtype, in the layout of strips; summed in float32.

    Memory: the result, and 12 of its 16 taps in float32 while it is made.
    """
    out_channels, in_channels = weight.shape[:2]
    result = torch.empty(
        (in_channels, out_channels, 4, 4),
        dtype=weight.dtype, device=weight.device, memory_format=layout(weight.device),
    )  # fmt: skip
    high = weight.new_empty(out_channels, in_channels, 4, 3, dtype=torch.float32)
    _meet(weight, high, 2)
    _meet(high, result.transpose(0, 1), 3)
    return result


def _meet(taps: torch.Tensor, into: torch.Tensor, side: int) -> None:
    """Of the 3 taps along one side, sums those that meet in each of the 4."""
    one, two, three = taps.unbind(side)
    ends = into.unbind(side)
    ends[0].copy_(three)
    torch.add(two, three, out=ends[1])
    torch.add(one, two, out=ends[2])
    ends[3].copy_(one)


class DownConv:
    """A 3 x 3 convolution of stride 2 with one zero row below and one zero column on the right.

    Args:
        weight: [C_out, C_in, 3, 3], float.
        bias: [C_out], float, or None.
        height: rows of the map before; floor(height / 2) come out.

    Memory: a call holds its input, that with its halo, and its output.
    Exact: equal up to rounding to the convolution of the whole map.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, *, height: int) -> None:
        self._weight = weight.contiguous(memory_format=layout(weight.device))
        self._bias, self._height = bias, height

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor:
        keep = self._height if keep >= self._height // 2 else 2 * keep
        return self.of(read(2 * first, min(2 * last + 1, self._height), keep))

    def of(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """As `make`, from the rows that it would read; empties the list."""
        one, count = parts[0], sum(part.shape[2] for part in parts)
        rows = count + 1 - count % 2  # with the zero row below an even number of rows
        window = torch.empty(
            (1, one.shape[1], rows, one.shape[3] + 1),
            dtype=one.dtype, device=one.device, memory_format=layout(one.device),
        )  # fmt: skip
        del one
        window[..., -1:].zero_()
        done = 0
        while parts:
            part = parts.pop(0)
            window[:, :, done : done + part.shape[2], :-1].copy_(part)
            done += part.shape[2]
        if done < rows:
            window[:, :, done:].zero_()
        return functional.conv2d(window, self._weight, self._bias, stride=2)
