"""The steps of a decode or encode over strips: store a map, pool a norm, run a block.

A group norm needs the whole map before the next convolution may read it. So each step reads a map
once from top to bottom. A map is stored only where the plan says so; what is not stored is
recomputed each time it is read:

| the plan keeps | a block costs | and holds |
|---|---|---|
| input, hidden, output | each convolution once | its input and its hidden map |
| output | its first convolution twice | its input, which its output replaces strip by strip |
| nothing | all that comes before it, twice more | what the level began with |

An encoder has two more ways. Its first map is made of three channels, so it is recomputed from the
picture: the first block stores its hidden map at no cost and replaces it by its output. The plan
may store a share of these rows and recompute the others. The downsampling is linear: with
`adds_after` the last block is summed behind it, so that the larger map is not held for the skip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch.nn import functional

from ..cuts import pieces
from .cuts import query_rows
from .layers import AttentionLayers, BlockLayers, ConvLayer, Fetch, NormLayer, VaeLayers
from .maps import Joined, Part, Piped, Rows, Stored
from .plan import LevelPlan
from .ram import Ram
from .resample import DownConv, UpConv
from .statistics import GroupStats, NormSiLU
from .strips import Conv, Pointwise, ResBlock, Stage, copy_rows

# Called after each strip with its share of the map that is read; may raise to end the work.
Tick = Callable[[float], None]
# Takes the strips of the result in order, with the number of their first row.
RowsWriter = Callable[[int, torch.Tensor], None]


def step_count(layers: VaeLayers) -> int:
    """How many maps a decode or encode reads: the sum of its ticks, or up to one a level fewer."""
    blocks = sum(len(level.blocks) for level in layers.levels) + len(layers.middle)
    return 2 * blocks + 2  # each block has two norms; the last norm and the result come after


class Pooled(NamedTuple):
    """A norm with its map's statistics: mean and biased variance of each group, float64."""

    layer: NormLayer
    mean: torch.Tensor
    variance: torch.Tensor

    def open(self, until: ExitStack) -> NormSiLU:
        """The norm for strips; borrows the layer's weight."""
        weight, bias = self.layer.fetch(until)
        if bias is None:
            raise ValueError("a group norm must have a bias")
        return NormSiLU(self.mean, self.variance, weight, bias, eps=self.layer.eps)


class Steps:
    """The steps of one sample; `level` is the plan of the level at work."""

    def __init__(self, level: LevelPlan, tick: Tick, ram: Ram | None = None) -> None:
        self.level, self._tick, self._ram = level, tick, ram or Ram()

    def store(
        self,
        source: Rows,
        stats: GroupStats | None = None,
        *,
        drain: bool = True,
        remade: Piped | None = None,
    ) -> Rows:
        """Reads a map into strips that are kept, and adds them to the statistics.

        Of a map that can be `remade`, keeps the plan's share of the rows; readers recompute the
        others.
        """
        top = source.height if remade is None else max(1, int(self.level.share * source.height))
        stored = self._empty(top)
        for strip in self._strips(source, drain=drain):
            if stats is not None:
                stats.add(strip[0])
            if stored.missing < strip[0].shape[2]:
                strip.append(strip.pop()[:, :, : stored.missing].clone())  # a view would keep all
            if stored.missing:
                stored.append(strip.pop())
        return stored if remade is None or top == source.height else Part(stored, remade)

    def pool(self, source: Rows, norm: NormLayer) -> Pooled:
        """A norm with the statistics of the map, which can be read again."""
        stats = GroupStats(norm.groups)
        for strip in self._strips(source, drain=False):
            stats.add(strip.pop())
        return Pooled(norm, *stats.pooled())

    def keep(self, source: Rows, norm: NormLayer, *, is_stored: bool = True) -> tuple[Rows, Pooled]:
        """The map, stored if `is_stored`, and a norm with its statistics."""
        if not is_stored:
            return source, self.pool(source, norm)
        stats = GroupStats(norm.groups)
        remade = source.remade if isinstance(source, Joined) else None
        stored = self.store(source, stats, remade=remade)
        return stored, Pooled(norm, *stats.pooled())

    def write(self, source: Rows, write: RowsWriter) -> None:
        """Reads the result and hands its rows to the writer."""
        first = 0
        for strip in self._strips(source, drain=True):
            write(first, strip[0])
            first += strip.pop().shape[2]

    def middle(self, source: Rows, layers: VaeLayers) -> Rows:
        """The blocks and the attention of the smallest map."""
        first, attention, last = layers.middle
        source, norm = self.keep(source, first.norm1)
        source, norm = self.keep(self.block(source, norm, first), attention.norm)
        source = self.attended(source, norm, attention)
        return self.block(source, self.pool(source, last.norm1), last)

    def more_blocks(self, source: Rows, blocks: Sequence[BlockLayers]) -> Rows:
        """Further blocks of a level; the last one's map is not stored yet."""
        for block in blocks:
            source, norm = self.keep(source, block.norm1, is_stored=self.level.keeps_output)
            source = self.block(source, norm, block)
        return source

    def first_block(self, source: Piped, norm: Pooled, block: BlockLayers) -> Rows:
        """A residual block of a map that costs next to nothing to recompute."""
        if block.shortcut is not None:
            return self.block(source, norm, block)
        first, stats = self.convolved(source, block.conv1, norm), GroupStats(block.norm2.groups)
        hidden = self.store(first, stats, drain=False, remade=first)
        norm2 = Pooled(block.norm2, *stats.pooled())
        remade = self._piped(source, norm, norm2, block)
        return Joined(self.convolved(hidden, block.conv2, norm2), source, remade)

    def block(self, source: Rows, norm: Pooled, block: BlockLayers) -> Rows:
        """A residual block's map; reading it with `drain` drains the source."""
        first = self.convolved(source, block.conv1, norm)
        if not self.level.keeps_hidden:
            return self._piped(source, norm, self.pool(first, block.norm2), block)
        skip, shortcut = source, block.shortcut
        is_narrower = block.conv2.channels <= source.channels
        if shortcut is not None and isinstance(source, Stored) and is_narrower:
            skip = self._empty(source.height)
            with ExitStack() as until:
                across = Pointwise(*shortcut.fetch(until))
                hidden, norm2 = self._split(source, norm, block, across, skip)
        else:
            stats = GroupStats(block.norm2.groups)
            hidden = self.store(first, stats, drain=False)
            norm2 = Pooled(block.norm2, *stats.pooled())
            if shortcut is not None:
                skip = Piped(
                    source,
                    lambda until, is_last, height: Pointwise(*shortcut.fetch(until)),
                    shortcut.channels,
                )
        return Joined(self.convolved(hidden, block.conv2, norm2), skip)

    def _piped(self, source: Rows, norm: Pooled, norm2: Pooled, block: BlockLayers) -> Piped:
        def open_block(until: ExitStack, is_last: bool, height: int) -> Stage:
            first = _conv(height, norm, block.conv1, until)
            second = _conv(height, norm2, block.conv2, until)
            shortcut = block.shortcut and Pointwise(*block.shortcut.fetch(until))
            return ResBlock(first, second, shortcut)

        return Piped(source, open_block, block.conv2.channels, reach=2)

    def attended(self, source: Rows, norm: Pooled, layers: AttentionLayers) -> Stored:
        """The attention block's map, in the strips' own memory.

        Memory: 4 maps: itself, normed, keys and values; and 3 parts for the queries at work.
        """
        rows = torch.cat(list(source.read(source.height, drain=True)), 2)
        rows = rows.contiguous(memory_format=torch.channels_last)
        # [1, C, H, W] -> [H * W, C], a view
        flat = rows.permute(0, 2, 3, 1).flatten(0, 2)
        tokens = flat.shape[0]
        with ExitStack() as until:
            normed = norm.open(until).norm(rows).permute(0, 2, 3, 1).flatten(0, 2)
            query, key, value, out = (
                _linear(fetch, until)
                for fetch in (layers.query, layers.key, layers.value, layers.out)
            )
            keys, values = key(normed)[None, None], value(normed)[None, None]
            part = min(query_rows(tokens), layers.most_queries(keys))
            for start, stop in pieces(tokens, part):
                made = layers.attend(query(normed[start:stop])[None, None], keys, values)
                flat[start:stop].add_(out(made[0, 0]))
                self._tick((stop - start) / tokens)
        stored = self._empty(source.height)
        stored.append(rows)
        return stored

    def convolved(self, source: Rows, conv: ConvLayer, norm: Pooled | None = None) -> Piped:
        """A 3 x 3 convolution of the map, or of its SiLU after the norm."""
        return Piped(
            source,
            lambda until, is_last, height: _conv(height, norm, conv, until),
            conv.channels,
            reach=1,
        )

    def upsampled(self, source: Rows, conv: ConvLayer, *, is_fused: bool) -> Rows:
        """Nearest upsampling by 2 and a convolution.

        Unless `is_fused`, it is fused only where the map is read for statistics: the rounded sums
        of taps shift every pixel, but hardly the moments of a group.
        """

        def open_up(until: ExitStack, is_last: bool, height: int) -> Stage:
            weight, bias = conv.fetch(until)
            return UpConv(weight, bias, height=height, is_fused=is_fused or not is_last)

        return Piped(source, open_up, conv.channels, 2)

    def downsampled(self, source: Rows, conv: ConvLayer) -> Rows:
        """A convolution of stride 2."""
        return Piped(
            source,
            lambda until, is_last, height: DownConv(*conv.fetch(until), height=height),
            conv.channels,
            0.5,
            most=self.level.limit,
        )

    def downsampled_sum(
        self, source: Rows, norm: Pooled, block: BlockLayers, conv: ConvLayer
    ) -> Rows:
        """A residual block without a shortcut, and a convolution of stride 2 on both its parts.

        Memory: the hidden map, which replaces the source, and the source's part of the result.
        """
        skip = self._empty(source.height // 2)
        with ExitStack() as until:
            down = DownConv(*conv.fetch(until), height=source.height)
            hidden, norm2 = self._split(source, norm, block, down, skip)

        def open_down(until: ExitStack, is_last: bool, height: int) -> Stage:
            weight, _ = conv.fetch(until)  # the bias is in the skip's part
            return DownConv(weight, None, height=height)

        second = self.convolved(hidden, block.conv2, norm2)
        limit = self.level.limit
        return Joined(Piped(second, open_down, conv.channels, 0.5, most=limit), skip)

    def _strips(self, source: Rows, *, drain: bool) -> Iterator[list[torch.Tensor]]:
        """Reads a map once: each strip in a list, from which its user takes it to free it."""
        for rows in source.read(self.level.limit, drain=drain):
            strip, share = [rows], rows.shape[2] / source.height
            del rows
            yield strip
            self._tick(share)

    def _empty(self, height: int) -> Stored:
        return Stored(height, self.level.limit, ram=self._ram if self.level.in_ram else None)

    def _split(
        self, source: Rows, norm: Pooled, block: BlockLayers, across: Stage, skip: Stored
    ) -> tuple[Stored, Pooled]:
        """A block's hidden map with its norm; beside it fills `skip`, so that the source can go."""
        stats, hidden = GroupStats(block.norm2.groups), self._empty(source.height)
        with ExitStack() as until:
            first = _conv(source.height, norm, block.conv1, until)
            for strip in self._strips(source, drain=True):
                beside = across.push(strip[0])
                if beside is not None:
                    skip.append(beside)
                del beside
                made = first.push(strip.pop())
                if made is not None:
                    stats.add(made)
                    hidden.append(made)
                del made
        return hidden, Pooled(block.norm2, *stats.pooled())


def _conv(height: int, norm: Pooled | None, conv: ConvLayer, until: ExitStack) -> Conv:
    weight, bias = conv.fetch(until)
    write = copy_rows if norm is None else norm.open(until).write
    return Conv(weight, bias, height=height, write=write)


def _linear(fetch: Fetch, until: ExitStack) -> Callable[[torch.Tensor], torch.Tensor]:
    """A 1 x 1 convolution as a product of rows [T, C_in]."""
    weight, bias = fetch(until)
    return lambda rows: functional.linear(rows, weight.flatten(1), bias)
