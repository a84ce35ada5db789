"""Operations of a block that map rows (tokens) to rows.

Rows are independent in every operation but attention, so doing them chunk by chunk is exact.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .cuts import joined

# Maps rows [T, C_in] to new rows [T, C_out].
RowsFn = Callable[[torch.Tensor], torch.Tensor]
# Maps rows [T, C_in] to the output features first:last of a linear layer, in a new tensor or in the
# one that is given.
ColumnsFn = Callable[[torch.Tensor, int, int | None, torch.Tensor | None], torch.Tensor]


class Projection:
    """A linear layer that is fetched once, at its first use.

    Args:
        fetch: returns the product of rows with the output features first:last.
        is_whole: each call computes all output features, whatever is asked (quantised layers).
        is_own: nobody else may hold what a call returns, so it may be written over.
        is_direct: columns are written without a tensor of their own.
    """

    def __init__(
        self,
        fetch: Callable[[], ColumnsFn],
        *,
        is_whole: bool = False,
        is_own: bool = True,
        is_direct: bool = True,
    ) -> None:
        self._fetch, self.is_whole, self.is_own = functools.cache(fetch), is_whole, is_own
        self.is_direct = is_direct and not is_whole

    def __call__(self, rows: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows [T, C_in] times the output features first:last.

        Memory: T * (last - first) elements; T * C_out where `is_whole`.
        Exact: bit-exact on CPU: an output feature does not depend on the others.
        """
        return self._fetch()(rows, first, last, None)

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """As a call for all output features, in a tensor that may be written over.

        Memory: as a call; twice that unless it `is_own`.
        Exact: as a call.
        """
        made = self(rows)
        return made if self.is_own else made.clone()

    def write(
        self, rows: torch.Tensor, spans: Sequence[tuple[int, int]], into: torch.Tensor
    ) -> None:
        """Writes rows [T, C_in] times the output features of each span side by side into a tensor.

        Args:
            into: [T, sum of the spans], with any stride between its rows.

        Memory: nothing; T * C_out elements where `is_whole`.
        Exact: as a call.
        """
        multiply, begin = self._fetch(), 0
        product = multiply(rows, 0, None, None) if self.is_whole else None
        for first, last in spans:
            part, begin = into[:, begin : begin + last - first], begin + last - first
            if product is None:
                multiply(rows, first, last, part)
            else:
                part.copy_(product[:, first:last])


class Columns(NamedTuple):
    """Output features of a projection, from the one named `first`."""

    projection: Projection
    first: int = 0


def write_columns(
    rows: torch.Tensor, wanted: Sequence[tuple[Columns, int, int]], into: torch.Tensor
) -> None:
    """Writes rows [T, C_in] times runs of output features side by side into a tensor.

    Runs of one projection that follow one another take one product where their features join.

    Args:
        wanted: columns, and the first and last of them.
        into: [T, sum of the runs].

    Memory: nothing; T * C_out elements for a projection that `is_whole`.
    Exact: as a projection's call.
    """
    begin = 0
    for projection, runs in itertools.groupby(wanted, lambda run: run[0].projection):
        spans = [(columns.first + first, columns.first + last) for columns, first, last in runs]
        end = begin + sum(last - first for first, last in spans)
        projection.write(rows, joined(spans), into[:, begin:end])
        begin = end


def columns_of(weight: torch.Tensor, bias: torch.Tensor | None) -> ColumnsFn:
    """Multiplies rows by some rows of weight [C_out, C_in] and of bias [C_out]."""

    def multiply(
        rows: torch.Tensor, first: int, last: int | None, into: torch.Tensor | None
    ) -> torch.Tensor:
        # The two products of torch's linear for rows in two axes, which alone can write into views.
        columns = weight[first:last].t()
        if bias is None:
            return torch.mm(rows, columns, out=into)
        return torch.addmm(bias[first:last], rows, columns, out=into)

    return multiply


class Shift(NamedTuple):
    """Scale and shift of rows, one vector each: rows * scale + shift, rounded once.

    scale, shift: [C].

    Source: apply_mod of the host's comfy/ldm/flux/layers.py.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def apply_(self, rows: torch.Tensor) -> torch.Tensor:
        """Scales and shifts rows [T, C] in place.

        Memory: 0.
        Exact: bit-exact.
        """
        return torch.addcmul(self.shift, rows, self.scale, out=rows)


class Modulation(NamedTuple):
    """Factors for the channels of rows, one vector per segment of tokens.

    segments: (first, last, factors [C]) without gaps, in order; none in blocks without modulation.
    """

    segments: Sequence[tuple[int, int, torch.Tensor]]

    def multiply_(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Multiplies rows [T, C], whose first is token `start`, in place.

        Memory: 0.
        Exact: bit-exact; the same product as out of place.
        """
        stop = start + rows.shape[0]
        for first, last, factors in self.segments:
            if first < stop and last > start:
                rows[max(first - start, 0) : last - start].mul_(factors)
        return rows


def clamp_fp16_(rows: torch.Tensor) -> torch.Tensor:
    """Makes half-precision rows finite in place.

    Source: clamp_fp16 of the host's comfy/ldm/lumina/model.py.
    """
    if rows.dtype == torch.float16:
        torch.nan_to_num(rows, nan=0.0, posinf=65504, neginf=-65504, out=rows)
    return rows
