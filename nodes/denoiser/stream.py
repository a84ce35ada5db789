"""A residual stream in a block that scales, shifts and gates it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .rows import RowsFn, Shift


class Factors(NamedTuple):
    """What modulates a run of tokens.

    first, last: tokens of the run.
    shift: of the normed rows; None: they stay as normed.
    gate: factors of what is added, [D]; None: it is added as it is.
    """

    first: int
    last: int
    shift: Shift | None
    gate: torch.Tensor | None


class Stream(NamedTuple):
    """A residual stream of one sample, and what modulates it.

    source: [T, D], float, with any strides.
    target: [T, D], float; may be `source`.
    norm: rows [t, D] -> new [t, D].
    factors: of the runs of its tokens, without gaps, in order.
    is_fused: target = source + gate * change is rounded once, else the product too.

    Source: apply_mod and the gates of the host's comfy/ldm/flux/layers.py, qwen_image/model.py and
    wan/model.py.
    """

    source: torch.Tensor
    target: torch.Tensor
    norm: RowsFn
    factors: Sequence[Factors]
    is_fused: bool = True

    def modulated(self, start: int, stop: int) -> torch.Tensor:
        """Rows of a run of tokens, normed, scaled and shifted: new [stop - start, D].

        Memory: the rows.
        Exact: bit-exact.
        """
        rows = self.norm(self.source[start:stop])
        for first, last, factors in self._runs(start, stop):
            if factors.shift is not None:
                factors.shift.apply_(rows[first - start : last - start])
        return rows

    def add(self, change: torch.Tensor, start: int) -> None:
        """Adds rows [t, D], times the gate, from a token on; may write over them.

        Memory: 0.
        Exact: bit-exact.
        """
        for first, last, factors in self._runs(start, start + change.shape[0]):
            rows, gate = change[first - start : last - start], factors.gate
            source, target = self.source[first:last], self.target[first:last]
            if gate is None:
                torch.add(source, rows, out=target)
            elif self.is_fused:
                torch.addcmul(source, gate, rows, out=target)
            else:
                torch.add(source, rows.mul_(gate), out=target)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, Factors]]:
        for factors in self.factors:
            first, last = max(start, factors.first), min(stop, factors.last)
            if first < last:
                yield first, last, factors
