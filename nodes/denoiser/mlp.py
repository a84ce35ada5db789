"""The hidden rows of a feed-forward with one factor or two, and the half of a block around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..cuts import pieces
from .cuts import DenoiserPlan, chunks
from .rows import Columns, Projection, write_columns
from .stream import Stream

# Applies the activation to rows, in place.
ActivationFn = Callable[[torch.Tensor], object]


class Hidden(NamedTuple):
    """The hidden rows: activation(first), times second where there is one.

    width: H, in elements.
    """

    width: int
    first: Columns
    second: Columns | None
    activation_: ActivationFn

    def write(self, rows: torch.Tensor, into: torch.Tensor, plan: DenoiserPlan) -> None:
        """Writes the hidden rows of rows [T, D] into a tensor [T, H].

        Memory: T * H / hidden_blocks elements for the second factor. Where a projection `is_whole`,
            its product: of both factors if it gives both. What a product holds besides.
        Exact: bit-exact on CPU.
        """
        first, second = self.first, self.second
        if second is None:
            write_columns(rows, [(first, 0, self.width)], into)
            self.activation_(into)
        elif first.projection is second.projection and first.projection.is_whole:
            self.write_of(first.projection(rows), into)
        else:
            write_columns(rows, [(first, 0, self.width)], into)
            self.activation_(into)
            blocks = plan.feed_blocks(is_whole=second.projection.is_whole)
            for begin, end in pieces(self.width, -(-self.width // blocks)):
                factor = second.projection(rows, second.first + begin, second.first + end)
                into[:, begin:end].mul_(factor)
                del factor

    def write_of(self, product: torch.Tensor, into: torch.Tensor) -> None:
        """As `write`, of all that the one projection of both factors gives, which is only read."""
        into.copy_(product[:, self.first.first : self.first.first + self.width])
        self.activation_(into)
        if self.second is not None:
            into.mul_(product[:, self.second.first : self.second.first + self.width])


def add_mlp(
    streams: Iterable[Stream], *, hidden: Hidden, out: Projection, plan: DenoiserPlan
) -> None:
    """Adds out(hidden(modulated rows)) to streams, one after the other, chunk by chunk.

    Args:
        streams: whose target is their source, [T, D], float.
        out: H -> D.
        plan: its feed_tokens and hidden_blocks.

    Memory: feed_tokens * (D + (1 + 1 / hidden_blocks) H) elements; H alone with one factor.
    Exact: bit-exact on CPU (rows and output features are independent).
    """
    for stream in streams:
        for start, stop in chunks(stream.source.shape[0], plan.feed_tokens):
            rows = stream.modulated(start, stop)
            made = rows.new_empty(stop - start, hidden.width)
            hidden.write(rows, made, plan)
            del rows  # before out allocates its result
            change = out.own(made)
            del made
            stream.add(change, start)
            del change  # before the next chunk allocates
