"""Operations of a block that map rows (tokens) to rows.

Rows are independent in every operation but attention, so doing them chunk by chunk is exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

# Maps rows [T, C_in] to new rows [T, C_out].
RowsFn = Callable[[torch.Tensor], torch.Tensor]
# Maps rows [T, C_in] to the output features first:last of a linear layer.
ColumnsFn = Callable[[torch.Tensor, int, int | None], torch.Tensor]


class Projection:
    """A linear layer that is fetched once, at its first use.

    Args:
        fetch: returns the product of rows with the output features first:last.
        is_whole: each call computes all output features, whatever is asked (quantised layers).
    """

    def __init__(self, fetch: Callable[[], ColumnsFn], *, is_whole: bool = False) -> None:
        self._fetch, self.is_whole = functools.cache(fetch), is_whole

    def __call__(self, rows: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows [T, C_in] times the output features first:last.

        Memory: T * (last - first) elements; T * C_out where `is_whole`.
        Exact: bit-exact on CPU: an output feature does not depend on the others.
        """
        return self._fetch()(rows, first, last)

    def columns(self, rows: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        """The product of the rows with any output features first:last, in one call if `is_whole`.

        Memory: nothing, T * C_out elements where `is_whole`; then the results are views of them.
        """
        if not self.is_whole:
            return functools.partial(self, rows)
        product = self(rows)
        return lambda first, last: product[:, first:last]


def columns_of(weight: torch.Tensor, bias: torch.Tensor | None) -> ColumnsFn:
    """Multiplies rows by some rows of weight [C_out, C_in] and of bias [C_out]."""
    return lambda rows, first, last: functional.linear(
        rows, weight[first:last], None if bias is None else bias[first:last]
    )


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
