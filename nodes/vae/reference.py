"""Oracles for the tests of the VAE's strips: short and slow, on whole maps."""

from __future__ import annotations

import torch


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, groups: int, eps: float = 1e-6
) -> torch.Tensor:
    """SiLU of the group norm of a map [1, C, H, W]; computed in float64."""
    grouped = x.double().unflatten(1, (groups, -1))
    mean = grouped.mean((2, 3, 4), keepdim=True)
    spread = (grouped - mean).square().mean((2, 3, 4), keepdim=True)
    normed = ((grouped - mean) / (spread + eps).sqrt()).flatten(1, 2)
    normed = normed * weight.double()[:, None, None] + bias.double()[:, None, None]
    return normed * normed.sigmoid()


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A 3 x 3 convolution of a map [1, C, H, W] with a padding of 1, tap by tap, in float64."""
    padded = torch.nn.functional.pad(x.double(), (1, 1, 1, 1))
    height, width = x.shape[2:]
    total = torch.zeros(1, weight.shape[0], height, width, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            total += torch.einsum("oc,bchw->bohw", weight[:, :, row, column].double(), shifted)
    return total if bias is None else total + bias.double()[:, None, None]


def upsampled_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The convolution of the map with each pixel repeated 2 x 2; in float64."""
    return convolution(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias)


def downsampled_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Every second row and column of the convolution, from the second on; in float64."""
    height, width = (size // 2 * 2 for size in x.shape[2:])
    return convolution(x, weight, bias)[:, :, 1:height:2, 1:width:2]


def residual_block(
    x: torch.Tensor,
    norms: list[tuple[torch.Tensor, torch.Tensor]],
    convolutions: list[tuple[torch.Tensor, torch.Tensor]],
    shortcut: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    groups: int,
) -> torch.Tensor:
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 x 1 convolution; in float64.

    Args:
        x: [1, C, H, W], float.
        norms: weight and bias of each norm, [C].
        convolutions: weight [C_out, C_in, 3, 3] and bias [C_out] of each convolution.
        shortcut: weight [C_out, C, 1, 1] and bias [C_out]; None adds x itself.
    """
    h = x
    for norm, conv in zip(norms, convolutions, strict=True):
        h = convolution(group_norm_silu(h, *norm, groups=groups), *conv)
    if shortcut is not None:
        weight, bias = (part.double() for part in shortcut)
        x = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x.double()) + bias[:, None, None]
    return x.double() + h


def rms_norm_silu(x: torch.Tensor, gamma: torch.Tensor, scale: float) -> torch.Tensor:
    """SiLU of x / |x| * scale * gamma, over the channels of [1, C, ...]; in float64."""
    x = x.double()
    normed = x / x.square().sum(1, keepdim=True).sqrt() * scale
    normed = normed * gamma.double().reshape(1, -1, *[1] * (x.ndim - 2))
    return normed * normed.sigmoid()


def causal_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A convolution of a video [1, C, T, H, W] that sees no later frame, tap by tap, in float64.

    Args:
        weight: [C_out, C, 3, k, k] with k 1 or 3; zeros lie around the video.
    """
    around = weight.shape[-1] // 2
    padded = torch.nn.functional.pad(x.double(), (around,) * 4 + (2, 0))
    frames, height, width = x.shape[2:]
    total = torch.zeros(1, weight.shape[0], frames, height, width, dtype=torch.float64)
    for time in range(3):
        for row in range(weight.shape[3]):
            for column in range(weight.shape[4]):
                taps = weight[:, :, time, row, column].double()
                rows, columns = slice(row, row + height), slice(column, column + width)
                shifted = padded[:, :, time : time + frames, rows, columns]
                total += torch.einsum("oc,bcthw->bothw", taps, shifted)
    return total if bias is None else total + bias.double().reshape(1, -1, 1, 1, 1)


def averaged(x: torch.Tensor, frames: int) -> torch.Tensor:
    """The means of 2 x 2 positions of [1, C, T, H, W]; in float64.

    Args:
        frames: so many frames become one, each with channels of its own; before the first frame
            lie zeros.
    """
    x = torch.nn.functional.pad(x.double(), (0, 0, 0, 0, frames - 1, 0))
    means = torch.nn.functional.avg_pool3d(x, (1, 2, 2))
    # [1, C, T * frames, ...] -> [1, C * frames, T, ...]
    return means.unflatten(2, (-1, frames)).transpose(2, 3).flatten(1, 2)


def repeated(x: torch.Tensor, channels: int, frames: int) -> torch.Tensor:
    """A video [1, C, T, H, W] of twice the rows and columns, channel by channel; in float64.

    Args:
        channels: of the result.
        frames: so many frames come of each, of the first one only the last.
    """
    times = channels * frames * 4 // x.shape[1]
    _, _, count, height, width = x.shape
    made = torch.empty(1, channels, count * frames, 2 * height, 2 * width, dtype=torch.float64)
    for channel in range(channels):
        for place in range(4 * frames):
            frame, row, column = place // 4, place // 2 % 2, place % 2
            source = (channel * 4 * frames + place) // times
            made[:, channel, frame::frames, row::2, column::2] = x[:, source].double()
    return made[:, :, frames - 1 :]
