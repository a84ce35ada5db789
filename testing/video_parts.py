"""Layers of a causal video VAE with random weights, their oracles, and a run over strips."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

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
from pack.nodes.vae.video.run import pushed
from pack.nodes.vae.video.sizes import Kind, Link, Part, Shortcut, frames_made
from pack.nodes.vae.video.steps import made_steps
from torch.nn import functional

CHANNELS, MADE, WIDTH = 6, 4, 5


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
    """A layer with random weights, and its oracle; of some kinds, `made` is as `given`."""

    def __init__(
        self, kind: Kind, dtype: torch.dtype, given: int = CHANNELS, made: int = MADE
    ) -> None:
        torch.manual_seed(len(kind))
        self.kind: Kind = kind
        self.dtype, self.given = dtype, given
        self.made = made if kind in ("point", "conv", "block", "up") else given
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
        self.layers, self.oracle = self._part(self.given)

    def _point(self) -> None:
        weight, bias = (fetch := self._fetch(self.made + 2, self.given, 1, 1, 1))(None)
        self.layers = PointLayers(fetch, self.made)
        self.oracle = lambda x: functional.conv3d(x.double(), weight.double(), bias.double())[
            :, : self.made
        ]

    def _block(self) -> None:
        (one, first), (two, second) = self._part(self.given), self._part(self.made)
        weight, bias = (fetch := self._fetch(self.made, self.given, 1, 1, 1))(None)
        self.layers = BlockLayers(one, two, fetch)
        self.oracle = lambda x: (
            second(first(x)) + functional.conv3d(x.double(), weight.double(), bias.double())
        )

    def _up(self) -> None:
        weight, bias = (fetch := self._fetch(self.made, self.given, 3, 3))(None)
        self.layers = ResampleLayers(fetch)
        self.oracle = lambda x: torch.stack(
            [reference.upsampled_convolution(frame, weight, bias) for frame in x.unbind(2)], 2
        )

    def _down(self) -> None:
        """The host pads at the end: as if the picture were turned round."""
        weight, bias = (fetch := self._fetch(self.given, self.given, 3, 3))(None)
        self.layers = ResampleLayers(fetch)

        def oracle(x: torch.Tensor) -> torch.Tensor:
            made = [reference.downsampled_convolution(f, weight, bias) for f in x.unbind(2)]
            return torch.stack(made, 2)

        self.oracle = oracle

    def _time_up(self) -> None:
        weight, bias = (fetch := self._fetch(2 * self.given, self.given, 3, 1, 1))(None)
        self.layers = ResampleLayers(fetch)

        def oracle(x: torch.Tensor) -> torch.Tensor:
            later = reference.causal_convolution(x[:, :, 1:], weight, bias)
            pairs = [half for frame in later.unbind(2) for half in frame.chunk(2, 1)]
            return torch.stack([x[:, :, 0].double(), *pairs], 2)

        self.oracle = oracle

    def _time_down(self) -> None:
        weight, bias = (fetch := self._fetch(self.given, self.given, 3, 1, 1))(None)
        self.layers = ResampleLayers(fetch)
        self.oracle = lambda x: torch.cat(
            [x[:, :, :1].double(), reference.causal_convolution(x, weight, bias)[:, :, 2::2]], 2
        )

    @property
    def link(self) -> Link:
        return Link(self.kind, self.given, self.made)


def in_strips(
    made: Sequence[Made],
    x: torch.Tensor,
    rows: int,
    *,
    is_decoder: bool,
    shortcuts: tuple[Shortcut, ...] = (),
) -> torch.Tensor:
    """Layers over strips of so many rows, of their result or of their input."""
    part = Part(tuple(one.link for one in made), shortcuts)
    frames, height = x.shape[2:4]
    stops = row_stops(row_kinds(part.links), height, rows, is_decoder=is_decoder)
    count = frames
    for link in part.links:
        count = frames_made(link.kind, count)
    found: list[list[torch.Tensor]] = [[] for _ in range(count)]
    with ExitStack() as until:
        steps = made_steps(
            part, [one.layers for one in made], convolve, until,
            heights=stops[-1], frames=frames, tick=lambda share: None,
        )  # fmt: skip
        done = [0] * len(stops[0])
        for stop in stops:
            for placed in steps:
                placed.begin(done, stop)
            strip: list[torch.Tensor] = []
            for frame in x[:, :, :, done[0] : stop[0]].unbind(2):
                pushed([placed.step for placed in steps], [frame], strip.append)
            for of_frame, one in zip(found, strip, strict=True):
                assert one.shape[2] == stop[-1] - done[-1]
                of_frame.append(one)
            done = stop
    return torch.stack([torch.cat(of_frame, 2) for of_frame in found], 2)
