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

import torch

from .attention import Tick, attended_
from .cuts import strips
from .layers import AttentionLayers, BlockLayers, ConvLayer, NormLayer, VaeLayers
from .maps import Joined, Part, Piped, Rows, Stored
from .pooled import Pooled, opened_conv
from .ram import Ram
from .resample import DownConv, UpConv
from .sizes import MOST_ELEMENTS, LevelPlan
from .statistics import GroupStats, Weights
from .strips import Beside, Pointwise, ResBlock, Stage, inner, kept

# Takes the strips of the result in order, with the number of their first row.
RowsWriter = Callable[[int, torch.Tensor], None]


def step_count(layers: VaeLayers) -> int:
    """How many maps a decode or encode reads: the sum of its ticks, or up to one a level fewer."""
    blocks = sum(len(level.blocks) for level in layers.levels) + len(layers.middle)
    return 2 * blocks + 2  # each block has two norms; the last norm and the result come after


class Steps:
    """The steps of one sample; `level` is the plan of the level at work."""

    def __init__(self, level: LevelPlan, tick: Tick, ram: Ram | None = None) -> None:
        self.level, self._tick, self._ram = level, tick, ram or Ram()
        self._weights: Weights = {}

    def store(
        self,
        source: Rows,
        stats: GroupStats | None = None,
        *,
        drain: bool = True,
        remade: Piped | None = None,
        is_one: bool = False,
    ) -> Rows:
        """Reads a map into strips that are kept, and adds them to the statistics.

        Of a map that can be `remade`, keeps the plan's share of the rows; readers recompute the
        others. With `is_one`, all strips are copied into one tensor.
        """
        top = source.height if remade is None else max(1, int(self.level.share * source.height))
        stored = self._empty(top, source.limit, is_one=is_one)
        for strip in self._strips(source, drain=drain):
            while strip:
                if stats is not None and not is_one:
                    stats.add(strip[0])
                if stored.missing < strip[0].shape[2]:
                    # A view would keep all.
                    strip[0] = strip[0][:, :, : stored.missing].clone()
                rows = [strip.pop(0)]
                if stored.missing:
                    stored.append(rows.pop())
        if stats is not None and is_one:
            for rows in stored.on_device():
                stats.add(rows)
        return stored if remade is None or top == source.height else Part(stored, remade)

    def pool(self, source: Rows, norm: NormLayer) -> Pooled:
        """A norm with the statistics of the map, which can be read again."""
        stats = self._stats(norm)
        for strip in self._strips(source, drain=False):
            while strip:
                stats.add(strip.pop(0))
        return Pooled(norm, stats.pooled())

    def keep(self, source: Rows, norm: NormLayer, *, is_stored: bool = True) -> tuple[Rows, Pooled]:
        """The map, stored if `is_stored`, and a norm with its statistics."""
        if not is_stored:
            return source, self.pool(source, norm)
        stats = self._stats(norm)
        remade = source.remade if isinstance(source, Joined) else None
        stored = self.store(source, stats, remade=remade)
        return stored, Pooled(norm, stats.pooled())

    def write(self, source: Rows, write: RowsWriter) -> None:
        """Gives the map's rows away."""
        first = 0
        for strip in self._strips(source, drain=True):
            while strip:
                write(first, strip[0])
                first += strip.pop(0).shape[2]

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
            return self.block(source, norm, block, is_first=True)
        first, stats = self.convolved(source, block.conv1, norm), self._stats(block.norm2)
        hidden = self.store(first, stats, drain=False, remade=first)
        norm2 = Pooled(block.norm2, stats.pooled())
        remade = self._piped(source, norm, norm2, block, self.level.limit)
        return Joined(self._second(hidden, norm2, block), source, remade)

    def block(
        self, source: Rows, norm: Pooled, block: BlockLayers, *, is_first: bool = False
    ) -> Rows:
        """A residual block's map; reading it with `drain` drains the source.

        Args:
            is_first: of its level, so that the source is of another size.
        """
        first = self.convolved(source, block.conv1, norm)
        if not self.level.keeps_hidden:
            limit = self.level.limit if is_first else self.level.later
            return self._piped(source, norm, self.pool(first, block.norm2), block, limit)
        skip, shortcut = source, block.shortcut
        is_narrower = block.conv2.channels <= source.channels
        if shortcut is not None and isinstance(source, Stored) and is_narrower:
            skip = self._empty(source.height, self.level.limit)
            with ExitStack() as until:
                across = Pointwise(*shortcut.fetch(until))
                beside = Beside(across.of, below=0)
                hidden, norm2 = self._split(source, norm, block, beside, skip)
        else:
            stats = self._stats(block.norm2)
            is_one = shortcut is None and not self.level.in_ram and first.limit < source.height
            is_one = is_one and source.height * source.width * source.channels <= MOST_ELEMENTS
            hidden = self.store(first, stats, drain=False, is_one=is_one)
            norm2 = Pooled(block.norm2, stats.pooled())
            if shortcut is not None:
                skip = Piped(
                    source,
                    lambda until, is_last: Pointwise(*shortcut.fetch(until)),
                    shortcut.channels,
                    self.level.later,
                )
        return Joined(self._second(hidden, norm2, block), skip)

    def _second(self, hidden: Rows, norm: Pooled, block: BlockLayers) -> Piped:
        """A block's second convolution. What is stored of its source is normed in place."""
        if isinstance(hidden, Stored) and not self.level.in_ram:
            with ExitStack() as until:
                opened = norm.open(until)
                for rows in hidden.on_device():
                    opened.write([rows], rows)
            return self.convolved(hidden, block.conv2)
        return self.convolved(hidden, block.conv2, norm)

    def _piped(
        self, source: Rows, norm: Pooled, norm2: Pooled, block: BlockLayers, limit: int
    ) -> Piped:
        def open_block(until: ExitStack, is_last: bool) -> Stage:
            first = opened_conv(source, norm, block.conv1, until)
            second = opened_conv(source, norm2, block.conv2, until)
            shortcut = block.shortcut and Pointwise(*block.shortcut.fetch(until))
            return ResBlock(first, second, shortcut, is_fresh=source.is_fresh)

        channels, carries = block.conv2.channels, self._is_chain(source)
        return Piped(source, open_block, channels, limit, carries=carries)

    def _is_chain(self, source: Rows) -> bool:
        """Whether what is recomputed of the source is recomputed itself, block after block."""
        return not self.level.keeps_output and isinstance(source, Piped)

    def attended(self, source: Rows, norm: Pooled, layers: AttentionLayers) -> Stored:
        """The attention block's map, in the memory of its one strip."""
        stored, height = self._empty(source.height, source.limit), source.height
        with ExitStack() as until:
            found = source.open(until, drain=True)(0, height, height)
            stored.append(attended_(found, norm.open(until).norm, layers, until, self._tick))
        return stored

    def convolved(self, source: Rows, conv: ConvLayer, norm: Pooled | None = None) -> Piped:
        """A 3 x 3 convolution of the map, or of its SiLU after the norm."""
        return Piped(
            source,
            lambda until, is_last: opened_conv(source, norm, conv, until),
            conv.channels,
            self.level.later,
        )

    def upsampled(self, source: Rows, conv: ConvLayer, to: LevelPlan, *, is_fused: bool) -> Rows:
        """Nearest upsampling by 2 and a convolution: the input of level `to`.

        Unless `is_fused`, it is fused only where the map is read for statistics: the rounded sums
        of taps shift every pixel, but hardly the moments of a group.
        """

        def open_up(until: ExitStack, is_last: bool) -> Stage:
            weight, bias = conv.fetch(until)
            return UpConv(weight, bias, height=source.height, is_fused=is_fused or not is_last)

        limit = to.limit if to.keeps_input else to.later
        return Piped(source, open_up, conv.channels, limit, 2, carries=not to.keeps_output)

    def downsampled(self, source: Rows, conv: ConvLayer) -> Rows:
        """A convolution of stride 2."""
        return Piped(
            source,
            lambda until, is_last: DownConv(*conv.fetch(until), height=source.height),
            conv.channels,
            max(1, self.level.later // 2),
            0.5,
        )

    def downsampled_sum(
        self, source: Rows, norm: Pooled, block: BlockLayers, conv: ConvLayer
    ) -> Rows:
        """A residual block without a shortcut, and a convolution of stride 2 on both its parts.

        Memory: the hidden map, which replaces the source, and the source's part of the result.
        """
        skip = self._empty(source.height // 2, max(1, self.level.later // 2))
        with ExitStack() as until:
            down = DownConv(*conv.fetch(until), height=source.height)
            beside = Beside(down.of, below=1)
            hidden, norm2 = self._split(source, norm, block, beside, skip)

        def open_down(until: ExitStack, is_last: bool) -> Stage:
            weight, _ = conv.fetch(until)  # the bias is in the skip's part
            return DownConv(weight, None, height=source.height)

        second = self._second(hidden, norm2, block)
        return Joined(Piped(second, open_down, conv.channels, skip.limit, 0.5), skip)

    def _strips(self, source: Rows, *, drain: bool) -> Iterator[list[torch.Tensor]]:
        """Reads a map once: each strip in a list, from which its user takes it to free it."""
        with ExitStack() as until:
            read = source.open(until, drain=drain)
            for first, last in strips(source.height, source.limit):
                yield read(first, last, last)
                self._tick((last - first) / source.height)

    def _empty(self, height: int, limit: int, *, is_one: bool = False) -> Stored:
        ram = self._ram if self.level.in_ram else None
        return Stored(height, limit, ram=ram, is_one=is_one)

    def _stats(self, norm: NormLayer) -> GroupStats:
        return GroupStats(norm.groups, norm.eps, self._weights)

    def _split(
        self, source: Rows, norm: Pooled, block: BlockLayers, beside: Beside, skip: Stored
    ) -> tuple[Stored, Pooled]:
        """A block's hidden map with its norm; beside it fills `skip`, so that the source can go."""
        height, limit = source.height, self.level.limit
        stats, hidden = self._stats(block.norm2), self._empty(height, limit)
        with ExitStack() as until:
            conv, read = (
                opened_conv(source, norm, block.conv1, until),
                source.open(until, drain=True),
            )
            for first, last in strips(height, limit):
                above, below = max(first - 1, 0), min(last + 1, height)
                parts = read(above, below, kept(last, 1, height))
                if skip.missing:  # downsampled, the last row of an odd map makes none
                    rows = inner(parts, first - above, last + beside.below - above)
                    skip.append(beside.made(rows))
                made = conv.of(parts, first, last, is_fresh=source.is_fresh)
                stats.add(made)
                hidden.append(made)
                del made
                self._tick((last - first) / height)
        return hidden, Pooled(block.norm2, stats.pooled())
