"""What a KL image VAE's decoder and encoder are made of, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

# Weight and bias of a layer, on the device and in the dtype of the map, until the stack closes.
Fetch = Callable[[ExitStack], tuple[torch.Tensor, "torch.Tensor | None"]]
# Queries, keys, values [1, 1, T, C] to [1, 1, T, C].
AttendFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class NormLayer:
    """A group norm."""

    fetch: Fetch
    groups: int
    eps: float


@dataclass(frozen=True)
class ConvLayer:
    """A convolution to `channels` channels."""

    fetch: Fetch
    channels: int


@dataclass(frozen=True)
class BlockLayers:
    """A residual block; `shortcut` where the channels change."""

    norm1: NormLayer
    conv1: ConvLayer
    norm2: NormLayer
    conv2: ConvLayer
    shortcut: ConvLayer | None


@dataclass(frozen=True)
class AttentionWeights:
    """The attention of the whole map with itself: four 1 x 1 convolutions around `attend`.

    most_queries: how many queries `attend` may get at a time, for keys [1, 1, T, C].
    """

    query: Fetch
    key: Fetch
    value: Fetch
    out: Fetch
    attend: AttendFn
    most_queries: Callable[[torch.Tensor], int]


@dataclass(frozen=True)
class AttentionLayers(AttentionWeights):
    """The attention with the group norm before it."""

    norm: NormLayer


@dataclass(frozen=True)
class LevelLayers:
    """The blocks of one resolution; `resample` goes to the next, None after the last."""

    blocks: Sequence[BlockLayers]
    resample: ConvLayer | None


@dataclass(frozen=True)
class VaeLayers:
    """A decoder or an encoder; its levels in the order of the calls, `middle` at the smallest."""

    conv_in: ConvLayer
    levels: Sequence[LevelLayers]
    middle: tuple[BlockLayers, AttentionLayers, BlockLayers]
    norm_out: NormLayer
    conv_out: ConvLayer
