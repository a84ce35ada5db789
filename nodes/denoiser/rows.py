"""Operations of a block that map rows (tokens) to rows.

Rows are independent in every operation but attention, so doing them chunk by chunk is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

# Maps rows [T, C_in] to new rows [T, C_out].
RowsFn = Callable[[torch.Tensor], torch.Tensor]


class Projection(NamedTuple):
    """A linear layer whose weight was fetched once.

    weight: [C_out, C_in], float; None where only the layer itself can multiply (quantised).
    bias: [C_out], float, or None.
    run: the layer itself, used where there is no weight.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    run: RowsFn

    def __call__(self, rows: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows [T, C_in] times the output features first:last.

        Memory: T * (last - first) elements; without a weight T * C_out.
        Exact: bit-exact on CPU: an output feature does not depend on the others.
        """
        if self.weight is None:
            return self.run(rows)[:, first:last]
        bias = None if self.bias is None else self.bias[first:last]
        return functional.linear(rows, self.weight[first:last], bias)


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
