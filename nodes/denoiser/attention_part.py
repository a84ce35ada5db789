"""A stream that takes part in an attention: how its q, k and v are made, and where results go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .cuts import chunks
from .rows import Columns, RowsFn, write_columns

# Norm and rotary embedding in place: of q rows, k rows or both, each [T, heads, head_dim] with any
# stride between rows and contiguous heads; and the token of the first row.
RotateFn = Callable[["torch.Tensor | None", "torch.Tensor | None", int], None]


class Heads(NamedTuple):
    """Head counts of an attention layer: query heads, key/value heads, channels per head."""

    query: int
    key_value: int
    channels: int


class Part(NamedTuple):
    """A stream that takes part in an attention, for one sample.

    source: residual stream, [T, D], float.
    modulated: normed and modulated rows of a run of its tokens, new [t, D].
    query, key, value: of those rows.
    rotate: norm and rotary embedding of q and k, in place.
    out: what heads attended to, [t, query * channels], and the first token -> new rows [t, D].
    add: adds those rows to the stream, from that token on; may write over them.
    scratch: [T, D] to overwrite, for what waits; None: a buffer is made if needed.
    is_packed: q, k and v are all that one projection gives, in that order.
    norms: of q and of k over all their heads, rows -> new rows; such a part is the only one, and
        its scratch is [T, query * channels] and no part of the source.
    """

    source: torch.Tensor
    modulated: Callable[[int, int], torch.Tensor]
    query: Columns
    key: Columns
    value: Columns
    rotate: RotateFn
    out: Callable[[torch.Tensor, int], torch.Tensor]
    add: Callable[[torch.Tensor, int], None]
    scratch: torch.Tensor | None = None
    is_packed: bool = False
    norms: tuple[RowsFn, RowsFn] | None = None

    @property
    def columns(self) -> tuple[Columns, Columns, Columns]:
        return self.query, self.key, self.value

    @property
    def gives_buffer(self) -> bool:
        """Whether one call of the projection makes what may hold q, k and v."""
        projection = self.query.projection
        return self.is_packed and projection.is_whole and projection.is_own

    def write(
        self, start: int, stop: int, wanted: Sequence[tuple[int, int, int]], into: torch.Tensor
    ) -> None:
        """Writes columns of q, k and v (0, 1, 2) of a run of tokens side by side into a tensor.

        Args:
            wanted: of which, and the first and last of its columns.
            into: [stop - start, sum of the columns].
        """
        rows = self.modulated(start, stop)
        runs = [(self.columns[kind], low, high) for kind, low, high in wanted]
        if self.norms is None:
            write_columns(rows, runs, into)
            return
        *others, (_, low, high) = wanted[:-1]  # v and q before k, which outlives the rows
        at = into.shape[1] - (wanted[-1][2] - wanted[-1][1])
        write_columns(rows, runs[-1:], into[:, at:])
        begin = 0
        for _, first, last in others:
            normed = self.norms[0](self.query.projection(rows))
            into[:, begin : begin + last - first] = normed[:, first:last]
            begin += last - first
            del normed
        product = self.key.projection(rows)
        del rows
        into[:, begin:at] = self.norms[1](product)[:, low:high]

    def with_kept_rows(self, chunk_tokens: int) -> tuple[Part, torch.Tensor, torch.Tensor]:
        """The part with its rows in `scratch`, from where q is made; and its k and v, [T, width].

        Each row is read before the result is written there.
        """
        rows = self.scratch
        if rows is None or self.norms is None:
            raise ValueError("scratch and norms must be given")
        tokens = rows.shape[0]
        runs = chunks(tokens, chunk_tokens)
        for start, stop in runs:
            rows[start:stop] = self.modulated(start, stop)
        key, value = torch.empty_like(rows), torch.empty_like(rows)
        for columns, into in ((self.key, key), (self.value, value)):
            for start, stop in [(0, tokens)] if columns.projection.is_direct else runs:
                write_columns(rows[start:stop], [(columns, 0, rows.shape[1])], into[start:stop])
        for start, stop in runs:
            key[start:stop] = self.norms[1](key[start:stop])
        return self._replace(modulated=lambda start, stop: rows[start:stop]), key, value

    def made_queries(self, start: int, stop: int, first: int, last: int) -> torch.Tensor:
        """Columns of q of a run of tokens, [stop - start, last - first]."""
        rows = self.modulated(start, stop)
        if self.norms is None:
            begin = self.query.first
            return self.query.projection(rows, begin + first, begin + last)
        product = self.query.projection(rows)
        del rows
        return self.norms[0](product)[:, first:last]

    def waiting(self, width: int) -> torch.Tensor:
        """Where results of earlier groups wait, at least [T, width]."""
        if self.scratch is not None:
            return self.scratch
        return self.source.new_empty(self.source.shape[0], width)
