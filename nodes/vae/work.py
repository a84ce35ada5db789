"""The parts of a decode or encode over strips: store a map, pool a norm, run a block.

A group norm needs the whole map before the next convolution may read it. A map is stored in full as
seldom as the plan says; what is not stored is computed again at each reading:

| the plan keeps | a block costs | and holds |
|---|---|---|
| input, hidden, output | each convolution once | its input and its hidden map |
| output | its first convolution twice | its input, which its output replaces strip by strip |
| nothing | all that stands before it, twice more | what the level began with |

An encoder has two more ways. Its first map is made of three channels, so the picture stands for it:
the first block's hidden map is stored at no cost and replaced by its output; and of both, the plan
may keep a share of the rows and make the others anew. The downsampling is linear: with `adds_after`
the last block's sum is made behind it, so that the larger map is not held for the skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch.nn import functional

from .layers import AttentionLayers, BlockLayers, ConvLayer, Fetch, NormLayer
from .maps import Joined, Part, Piped, Remade, Rows, Stored
from .plan import LevelPlan
from .resample import DownConv, UpConv
from .statistics import GroupStats, NormSiLU
from .strips import Conv, Pointwise, ResBlock, Stage, Tick, shortcut_rows

# Fewer queries at a time leave a card idle.
QUERY_ROWS = 4096
QUERY_PARTS = 8


class Pooled(NamedTuple):
    """A norm with the statistics of its map: mean and biased variance of each group, float64."""

    layer: NormLayer
    mean: torch.Tensor
    variance: torch.Tensor

    def open(self, until: ExitStack) -> NormSiLU:
        """The norm for strips; borrows the layer's weight."""
        weight, bias = self.layer.fetch(until)
        if bias is None:
            raise ValueError("a group norm must have a bias")
        return NormSiLU(self.mean, self.variance, weight, bias, eps=self.layer.eps)


class Work:
    """One sample's way through the levels; `level` is the plan of the one at work."""

    def __init__(self, level: LevelPlan, tick: Tick) -> None:
        self.level, self._tick = level, tick

    def store(self, source: Rows, stats: GroupStats | None = None, *, drain: bool = True) -> Stored:
        """Reads a map into strips that are kept, and adds them to the statistics."""
        stored = self._empty(source)
        for rows in source.read(self.level.limit, drain=drain):
            given = [rows]
            del rows
            if stats is not None:
                stats.add(given[0])
            stored.append(given.pop())
        return stored

    def _store_share(self, source: Rows, remade: Remade, stats: GroupStats, *, drain: bool) -> Rows:
        """As `store`, but the plan's share of the rows; the others are made at each reading."""
        top = max(1, int(self.level.share * source.height))
        if top == source.height:
            return self.store(source, stats, drain=drain)
        stored = Stored(top, self.level.limit, in_ram=self.level.in_ram)
        for rows in source.read(self.level.limit, drain=drain):
            given = [rows]
            del rows
            stats.add(given[0])
            if stored.missing < given[0].shape[2]:
                given.append(given.pop()[:, :, : stored.missing].clone())  # a view would keep all
            if stored.missing:
                stored.append(given.pop())
        return Part(stored, remade)

    def pool(self, source: Rows, norm: NormLayer) -> Pooled:
        """A norm with the statistics of the map, which stays."""
        stats = GroupStats(norm.groups)
        for rows in source.read(self.level.limit, drain=False):
            given = [rows]
            del rows
            stats.add(given.pop())
        return Pooled(norm, *stats.pooled())

    def keep(self, source: Rows, norm: NormLayer, *, is_stored: bool) -> tuple[Rows, Pooled]:
        """The map, stored if it is to be, and a norm with its statistics."""
        if not is_stored:
            return source, self.pool(source, norm)
        stats = GroupStats(norm.groups)
        if isinstance(source, Joined) and source.remade is not None:
            stored = self._store_share(source, source.remade, stats, drain=True)
        else:
            stored = self.store(source, stats)
        return stored, Pooled(norm, *stats.pooled())

    def blocks(self, source: Rows, norm: Pooled, blocks: Sequence[BlockLayers]) -> Rows:
        """The blocks of a level one after the other; the last one's map is not stored yet."""
        return self.more_blocks(self.block(source, norm, blocks[0]), blocks[1:])

    def more_blocks(self, source: Rows, blocks: Sequence[BlockLayers]) -> Rows:
        """Further blocks of a level, behind the map of the one before."""
        for block in blocks:
            source, norm = self.keep(source, block.norm1, is_stored=self.level.keeps_output)
            source = self.block(source, norm, block)
        return source

    def first_block(self, source: Remade, norm: Pooled, block: BlockLayers) -> Rows:
        """A residual block of a map that costs next to nothing to make again."""
        if block.shortcut is not None or not self.level.keeps_output:
            return self.block(source, norm, block)
        first, stats = self._first(source, norm, block), GroupStats(block.norm2.groups)
        hidden = self._store_share(first, first, stats, drain=False)
        norm2 = Pooled(block.norm2, *stats.pooled())
        remade = self._piped(source, norm, norm2, block)
        return Joined(hidden, source, self._open_second(source.height, norm2, block), remade)

    def block(self, source: Rows, norm: Pooled, block: BlockLayers) -> Rows:
        """A residual block's map; reading it with `drain` drains the source."""
        if self.level.keeps_hidden:
            return self._joined(source, norm, block)
        norm2 = self.pool(self._first(source, norm, block), block.norm2)
        return self._piped(source, norm, norm2, block)

    def _piped(self, source: Rows, norm: Pooled, norm2: Pooled, block: BlockLayers) -> Piped:
        def open_block(until: ExitStack, is_last: bool, height: int) -> Stage:
            first = self._conv(height, norm, block.conv1, until)
            second = self._conv(height, norm2, block.conv2, until)
            shortcut = block.shortcut.fetch(until) if block.shortcut else None
            return ResBlock(first, second, shortcut, tick=self._tick)

        return Piped(source, open_block, block.conv2.channels, reach=2)

    def attended(self, source: Rows, norm: Pooled, layers: AttentionLayers) -> Stored:
        """The attention block's map, in the strips' own memory.

        Memory: 4 maps: itself, normed, keys and values; and 3 parts for the queries at work.
        """
        rows = torch.cat(list(source.read(source.height, drain=True)), 2)
        rows = rows.contiguous(memory_format=torch.channels_last)
        # [1, C, H, W] -> [H * W, C], a view
        flat = rows.permute(0, 2, 3, 1).flatten(0, 2)
        with ExitStack() as until:
            normed = norm.open(until).norm(rows).permute(0, 2, 3, 1).flatten(0, 2)
            query, key, value, out = (
                _linear(fetch, until)
                for fetch in (layers.query, layers.key, layers.value, layers.out)
            )
            keys, values = key(normed), value(normed)
            part = max(QUERY_ROWS, -(-flat.shape[0] // QUERY_PARTS))
            for start in range(0, flat.shape[0], part):
                made = layers.attend(
                    query(normed[start : start + part])[None, None],
                    keys[None, None],
                    values[None, None],
                )
                self._tick(2 * made.numel() * flat.shape[0])
                flat[start : start + part].add_(out(made[0, 0]))
                self._tick(4 * made.numel() * flat.shape[1])
        stored = self._empty(source)
        stored.append(rows)
        return stored

    def convolved(self, source: Rows, conv: ConvLayer, norm: Pooled | None = None) -> Piped:
        """A 3 x 3 convolution of the map, of its SiLU after the norm if one is given."""

        def open_conv(until: ExitStack, is_last: bool, height: int) -> Stage:
            return self._conv(height, norm, conv, until)

        return Piped(source, open_conv, conv.channels, reach=1)

    def upsampled(self, source: Rows, conv: ConvLayer, *, is_fused: bool) -> Rows:
        """Nearest upsampling by 2 and a convolution.

        Unless `is_fused`, it is fused only where the map is read for statistics: the rounded sums
        of taps shift every pixel, but hardly the moments of a group.
        """

        def open_up(until: ExitStack, is_last: bool, height: int) -> Stage:
            weight, bias = conv.fetch(until)
            fused = is_fused or not is_last
            return UpConv(weight, bias, height=height, tick=self._tick, is_fused=fused)

        return Piped(source, open_up, conv.channels, 2)

    def downsampled(self, source: Rows, conv: ConvLayer) -> Rows:
        """A convolution of stride 2."""

        def open_down(until: ExitStack, is_last: bool, height: int) -> Stage:
            weight, bias = conv.fetch(until)
            return DownConv(weight, bias, height=height, tick=self._tick)

        return Piped(source, open_down, conv.channels, 0.5, most=self.level.limit)

    def downsampled_sum(
        self, source: Rows, norm: Pooled, block: BlockLayers, conv: ConvLayer
    ) -> Rows:
        """A residual block without a shortcut, and a convolution of stride 2 on both its parts.

        Memory: the hidden map, which replaces the source, and the source's part of the result.
        """
        stats, hidden = GroupStats(block.norm2.groups), self._empty(source)
        skip = Stored(source.height // 2, self.level.limit, in_ram=self.level.in_ram)
        with ExitStack() as until:
            first = self._conv(source.height, norm, block.conv1, until)
            weight, bias = conv.fetch(until)
            down = DownConv(weight, bias, height=source.height, tick=self._tick)
            for rows in source.read(self.level.limit, drain=True):
                given = [rows]
                del rows
                made = down.push(given[0])
                if made is not None:
                    skip.append(made)
                made = first.push(given.pop())
                if made is not None:
                    stats.add(made)
                    hidden.append(made)
                del made
        norm2 = Pooled(block.norm2, *stats.pooled())
        second = self.convolved(hidden, block.conv2, norm2)

        def open_down(until: ExitStack) -> Stage:
            weight, _ = conv.fetch(until)
            return DownConv(weight, None, height=source.height, tick=self._tick)

        return Joined(second, skip, open_down)

    def _empty(self, source: Rows) -> Stored:
        return Stored(source.height, self.level.limit, in_ram=self.level.in_ram)

    def _conv(self, height: int, norm: Pooled | None, conv: ConvLayer, until: ExitStack) -> Conv:
        weight, bias = conv.fetch(until)
        if norm is None:
            return Conv(weight, bias, height=height, tick=self._tick)
        write = norm.open(until).write
        return Conv(weight, bias, height=height, tick=self._tick, write=write)

    def _first(self, source: Rows, norm: Pooled, block: BlockLayers) -> Piped:
        return self.convolved(source, block.conv1, norm)

    def _open_second(
        self, height: int, norm: Pooled, block: BlockLayers
    ) -> Callable[[ExitStack], Conv]:
        return lambda until: self._conv(height, norm, block.conv2, until)

    def _joined(self, source: Rows, norm: Pooled, block: BlockLayers) -> Rows:
        """The block with the map between its convolutions stored."""
        stats = GroupStats(block.norm2.groups)
        skip = source
        is_narrower = block.conv2.channels <= source.channels
        if block.shortcut is not None and isinstance(source, Stored) and is_narrower:
            hidden, skip = self._split(source, norm, block, block.shortcut, stats)
        else:
            hidden = self.store(self._first(source, norm, block), stats, drain=False)
            if block.shortcut is not None:
                skip = self._pointwise(source, block.shortcut)
        norm2 = Pooled(block.norm2, *stats.pooled())
        return Joined(hidden, skip, self._open_second(source.height, norm2, block))

    def _split(
        self,
        source: Stored,
        norm: Pooled,
        block: BlockLayers,
        shortcut: ConvLayer,
        stats: GroupStats,
    ) -> tuple[Stored, Stored]:
        """The hidden map and the shortcut's, made together so that the source can go."""
        hidden, skip = self._empty(source), self._empty(source)
        with ExitStack() as until:
            first = self._conv(source.height, norm, block.conv1, until)
            across = shortcut.fetch(until)
            for rows in source.read(self.level.limit, drain=True):
                given = [rows]
                del rows
                skip.append(shortcut_rows(given[0], across, self._tick))
                made = first.push(given.pop())
                if made is not None:
                    stats.add(made)
                    hidden.append(made)
                del made
        return hidden, skip

    def _pointwise(self, source: Rows, conv: ConvLayer) -> Rows:
        def open_pointwise(until: ExitStack, is_last: bool, height: int) -> Stage:
            return Pointwise(conv.fetch(until), self._tick)

        return Piped(source, open_pointwise, conv.channels)


def _linear(fetch: Fetch, until: ExitStack) -> Callable[[torch.Tensor], torch.Tensor]:
    """A 1 x 1 convolution as a product of rows [T, C_in]."""
    weight, bias = fetch(until)
    return lambda rows: functional.linear(rows, weight.flatten(1), bias)
