"""A norm that waits for the strips of its map."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

from .layers import NormLayer
from .statistics import Moments, NormSiLU


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
