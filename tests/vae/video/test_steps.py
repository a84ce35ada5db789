"""The layers of a video VAE over strips against their oracles on whole videos."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from pack.nodes.vae import reference
from pack.nodes.vae.video.cuts import row_kinds, row_stops
from pack.nodes.vae.video.layers import (
    AnyLayers,
    BlockLayers,
    ConvLayers,
    PointLayers,
    ResampleLayers,
    RmsLayer,
)
from pack.nodes.vae.video.sizes import Kind, Link, frames_made
from pack.nodes.vae.video.step import Edges
from pack.nodes.vae.video.steps import made_step
from torch.nn import functional

CHANNELS, MADE, WIDTH = 6, 4, 5
# The second has a last strip of one row.
HEIGHTS = [(8, 8), (9, 4), (7, 100), (6, 1), (8, 3)]


def convolve(
    window: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    columns: int = 0,
    stride: int = 1,
) -> torch.Tensor:
    return functional.conv3d(window, weight, bias, (stride, 1, 1), (0, 0, columns))


class Made:
    """A layer with random weights, and its oracle."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        torch.manual_seed(len(kind))
        self.kind: Kind = kind
        self.dtype, self.made = (
            dtype,
            MADE if kind in ("point", "conv", "block", "up") else CHANNELS,
        )
        self.layers: AnyLayers
        self.oracle: Callable[[torch.Tensor], torch.Tensor]
        getattr(self, f"_{kind}")()

    def _fetch(self, *shape: int) -> Any:
        weight = (torch.randn(shape) * (2 / torch.Size(shape[1:]).numel()) ** 0.5).to(self.dtype)
        bias = (0.1 * torch.randn(shape[0])).to(self.dtype)
        return lambda until: (weight, bias)

    def _part(self, given: int) -> tuple[ConvLayers, Callable[[torch.Tensor], torch.Tensor]]:
        gamma = (1 + 0.2 * torch.randn(given, 1, 1)).to(self.dtype)
        fetch = self._fetch(self.made, given, 3, 3, 3)

        def oracle(x: torch.Tensor) -> torch.Tensor:
            normed = reference.rms_norm_silu(x, gamma, given**0.5)
            return reference.causal_convolution(normed, *fetch(None))

        return ConvLayers(RmsLayer(gamma, given**0.5), fetch), oracle

    def _conv(self) -> None:
        self.layers, self.oracle = self._part(CHANNELS)

    def _point(self) -> None:
        weight, bias = (fetch := self._fetch(MADE + 2, CHANNELS, 1, 1, 1))(None)
        self.layers = PointLayers(fetch, MADE)
        self.oracle = lambda x: functional.conv3d(x.double(), weight.double(), bias.double())[
            :, :MADE
        ]

    def _block(self) -> None:
        (one, first), (two, second) = self._part(CHANNELS), self._part(MADE)
        weight, bias = (fetch := self._fetch(MADE, CHANNELS, 1, 1, 1))(None)
        self.layers = BlockLayers(one, two, fetch)
        self.oracle = lambda x: (
            second(first(x)) + functional.conv3d(x.double(), weight.double(), bias.double())
        )

    def _up(self) -> None:
        weight, bias = (fetch := self._fetch(MADE, CHANNELS, 3, 3))(None)
        self.layers = ResampleLayers(fetch)
        self.oracle = lambda x: torch.stack(
            [reference.upsampled_convolution(frame, weight, bias) for frame in x.unbind(2)], 2
        )

    def _down(self) -> None:
        """The host pads at the end: as if the picture were turned round."""
        weight, bias = (fetch := self._fetch(CHANNELS, CHANNELS, 3, 3))(None)
        self.layers = ResampleLayers(fetch)

        def oracle(x: torch.Tensor) -> torch.Tensor:
            made = [reference.downsampled_convolution(f, weight, bias) for f in x.unbind(2)]
            return torch.stack(made, 2)

        self.oracle = oracle

    def _time_up(self) -> None:
        weight, bias = (fetch := self._fetch(2 * CHANNELS, CHANNELS, 3, 1, 1))(None)
        self.layers = ResampleLayers(fetch)

        def oracle(x: torch.Tensor) -> torch.Tensor:
            later = reference.causal_convolution(x[:, :, 1:], weight, bias)
            pairs = [half for frame in later.unbind(2) for half in frame.chunk(2, 1)]
            return torch.stack([x[:, :, 0].double(), *pairs], 2)

        self.oracle = oracle

    def _time_down(self) -> None:
        weight, bias = (fetch := self._fetch(CHANNELS, CHANNELS, 3, 1, 1))(None)
        self.layers = ResampleLayers(fetch)
        self.oracle = lambda x: torch.cat(
            [x[:, :, :1].double(), reference.causal_convolution(x, weight, bias)[:, :, 2::2]], 2
        )


def in_strips(made: Made, x: torch.Tensor, rows: int, *, is_decoder: bool) -> torch.Tensor:
    """The layer over strips of so many rows, of its result or of its input."""
    link = Link(made.kind, CHANNELS, made.made)
    frames, height = x.shape[2:4]
    stops = row_stops(row_kinds([link]), height, rows, is_decoder=is_decoder)
    found: list[list[torch.Tensor]] = [[] for _ in range(frames_made(made.kind, frames))]
    with ExitStack() as until:
        step = made_step(
            made.kind, made.layers, convolve, until,
            height=height, is_video=frames > 1, tick=lambda share: None,
        )  # fmt: skip
        done = [0] * len(stops[0])
        for stop in stops:
            step.begin(Edges(done, stop))
            number = 0
            for frame in x[:, :, :, done[0] : stop[0]].unbind(2):
                for one in step.push([frame]):
                    assert one.shape[2] == stop[-1] - done[-1]
                    found[number].append(one)
                    number += 1
            assert number == len(found)
            done = stop
    return torch.stack([torch.cat(parts, 2) for parts in found], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["point", "conv", "block", "up", "down", "time_up", "time_down"])
@torch.inference_mode()
def test_each_layer_equals_its_oracle(kind: Kind, dtype: torch.dtype) -> None:
    made = Made(kind, dtype)
    # Of a product and of each norm, bfloat16 keeps 8 bits.
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for frames in (1, 5):
        for height, rows in HEIGHTS:
            if kind == "down":
                height += height % 2
            x = torch.randn(1, CHANNELS, frames, height, WIDTH + 1).to(dtype)
            wanted = made.oracle(x)
            for is_decoder in (True, False):
                if is_decoder == (kind == "down") and kind in ("up", "down"):
                    continue
                result = in_strips(made, x, rows, is_decoder=is_decoder)
                assert result.shape == wanted.shape
                assert (result - wanted).norm() < bound * wanted.norm()


@torch.inference_mode()
def test_strips_are_bit_for_bit_those_of_one_strip() -> None:
    made = Made("block", torch.bfloat16)
    x = torch.randn(1, CHANNELS, 3, 19, 8).bfloat16()
    whole = in_strips(made, x, 19, is_decoder=True)
    for rows in (1, 2, 5, 18):
        assert torch.equal(in_strips(made, x, rows, is_decoder=True), whole)


@torch.inference_mode()
def test_a_block_leaves_what_it_is_given() -> None:
    made = Made("block", torch.float32)
    x = torch.randn(1, CHANNELS, 3, 8, 8)
    before = x.clone()
    in_strips(made, x, 3, is_decoder=True)
    assert torch.equal(x, before)
