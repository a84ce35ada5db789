"""What a causal video VAE's decoder and encoder are made of, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..layers import AttentionWeights, Fetch


class Convolve(Protocol):
    """A convolution without padding in time and rows, of a window [1, C, F, n, W]."""

    def __call__(
        self,
        window: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        columns: int = 0,
        stride: int = 1,
    ) -> torch.Tensor:
        """Pads `columns` on both sides; `stride` is that in time."""
        ...


@dataclass(frozen=True)
class RmsLayer:
    """An RMS norm over the channels: x / |x| * scale * gamma; gamma is [C, 1, 1], float."""

    gamma: torch.Tensor
    scale: float


@dataclass(frozen=True)
class PointLayers:
    """A 1 x 1 x 1 convolution; of its results, the first `channels` are used."""

    conv: Fetch
    channels: int


@dataclass(frozen=True)
class ConvLayers:
    """A causal 3 x 3 x 3 convolution, behind a norm and SiLU or without."""

    norm: RmsLayer | None
    conv: Fetch


@dataclass(frozen=True)
class BlockLayers:
    """A residual block; `shortcut` is a 1 x 1 x 1 convolution where the channels change."""

    first: ConvLayers
    second: ConvLayers
    shortcut: Fetch | None


@dataclass(frozen=True)
class AttentionBlock:
    """The attention of each frame with itself."""

    norm: RmsLayer
    layers: AttentionWeights


@dataclass(frozen=True)
class ResampleLayers:
    """The convolution of a resampling of rows and columns, or of frames: see `steps`."""

    conv: Fetch


AnyLayers = PointLayers | ConvLayers | BlockLayers | AttentionBlock | ResampleLayers


@dataclass(frozen=True)
class VideoLayers:
    """A decoder or encoder as `VideoSizes` describes it, with the convolution to compute with."""

    links: Sequence[AnyLayers]
    convolve: Convolve
