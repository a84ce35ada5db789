"""A norm that waits for the strips of its map, and the convolution behind it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from .layers import ConvLayer, NormLayer
from .maps import Rows
from .statistics import Moments, NormSiLU
from .strips import Conv


class Pooled(NamedTuple):
    """A norm with its map's statistics."""

    layer: NormLayer
    moments: Moments

    def open(self, until: ExitStack) -> NormSiLU:
        """The norm for strips; borrows the layer's weight."""
        weight, bias = self.layer.fetch(until)
        if bias is None:
            raise ValueError("a group norm must have a bias")
        return NormSiLU(self.moments, weight, bias, eps=self.layer.eps)


def opened_conv(source: Rows, norm: Pooled | None, conv: ConvLayer, until: ExitStack) -> Conv:
    """The convolution of the map, or of its SiLU after the norm; borrows the weights."""
    weight, bias = conv.fetch(until)
    opened = None if norm is None else norm.open(until)
    return Conv(weight, bias, height=source.height, norm=opened, is_fresh=source.is_fresh)
