"""Up- and downsampling over strips of rows, each one stage with its convolution."""

from __future__ import annotations

import torch
from torch.nn import functional

from .devices import layout
from .strips import Halo


class UpConv:
    """Nearest upsampling by 2, then a 3 x 3 convolution; two rows behind.

    Through the 3 x 3 taps, each of the four pixels of a 2 x 2 square sees only 2 x 2 different
    pixels. So the pair equals one transposed convolution of stride 2, whose 4 x 4 weight holds sums
    of taps: 4 multiply-adds per pixel and channel pair instead of 9.

    Args:
        weight: [C_out, C_in, 3, 3], float.
        bias: [C_out], float, or None.
        height: rows of the map before.
        is_fused: runs as a transposed convolution; otherwise the upsampled strip is made.

    Memory: a call holds its input, that with its halo, its output and, unless fused, the upsampled
        strip.
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
        self._bias, self._is_fused, self._halo = bias, is_fused, Halo(height)

    def push(self, rows: torch.Tensor) -> torch.Tensor | None:
        window = self._halo.window(rows)
        del rows
        if window is None:
            return None
        if self._is_fused:
            # Padding 3 drops the outermost 3 rows: they would need rows beyond the window.
            return functional.conv_transpose2d(
                window, self._weight, self._bias, stride=2, padding=(3, 1)
            )
        window = functional.interpolate(window, scale_factor=2.0, mode="nearest")
        # The outermost rows belong to the strips above and below, or to the padding.
        return functional.conv2d(window[:, :, 1:-1], self._weight, self._bias, padding=(0, 1))


def upsampling_weight(weight: torch.Tensor) -> torch.Tensor:
    """The transposed convolution's weight of nearest upsampling by 2 and a 3 x 3 convolution.

    Args:
        weight: [C_out, C_in, 3, 3], float.

    Returns:
        [C_in, C_out, 4, 4] of the same dtype; summed in float32.
    """
    # Of the 3 taps along one side, those that meet in each of the 4.
    meeting = (slice(2, 3), slice(1, 3), slice(0, 2), slice(0, 1))
    out_channels, in_channels = weight.shape[:2]
    result = weight.new_empty(in_channels, out_channels, 4, 4)
    for row, rows in enumerate(meeting):
        for column, columns in enumerate(meeting):
            taps = weight[:, :, rows, columns].sum((2, 3), dtype=torch.float32)
            result[:, :, row, column].copy_(taps.T)
    return result


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
        self._bias, self._left = bias, height
        self._carry: torch.Tensor | None = None

    def push(self, rows: torch.Tensor) -> torch.Tensor | None:
        _, channels, count, width = rows.shape
        self._left -= count
        above = 0 if self._carry is None else self._carry.shape[2]
        below = int(self._left == 0)
        window = torch.empty(
            (1, channels, above + count + below, width + 1),
            dtype=rows.dtype, device=rows.device, memory_format=layout(rows.device),
        )  # fmt: skip
        window[..., -1:].zero_()
        if self._carry is not None:
            window[:, :, :above, :-1].copy_(self._carry)
        window[:, :, above : above + count, :-1].copy_(rows)
        del rows
        if below:
            window[:, :, -1:].zero_()
        made_rows = (window.shape[2] - 1) // 2
        self._carry = window[:, :, 2 * made_rows :, :-1].clone()
        if made_rows == 0 or width < 2:
            return None
        return functional.conv2d(window, self._weight, self._bias, stride=2)
