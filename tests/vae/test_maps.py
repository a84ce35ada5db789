"""Maps as strips: what they give, and what they keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import pytest
import torch
from pack.nodes.vae.cuts import query_rows, strip_rows, strips
from pack.nodes.vae.maps import Joined, Part, Piped, Rows, Stored, Whole
from pack.nodes.vae.ram import Ram, RamStrip
from pack.nodes.vae.strips import Conv, ReadFn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Double:
    """A stage that needs no other rows."""

    def make(self, read: ReadFn, first: int, last: int, keep: int) -> torch.Tensor:
        return 2 * torch.cat(read(first, last, keep), 2)


def _read(
    source: Rows, runs: Sequence[tuple[int, int]], *, drain: bool = False
) -> list[torch.Tensor]:
    """The runs of one reading, each of several strips joined."""
    with ExitStack() as until:
        read = source.open(until, drain=drain)
        return [torch.cat(read(first, last, last), 2).clone() for first, last in runs]


def _stored(limit: int, cuts: list[int], ram: Ram | None = None) -> tuple[Stored, torch.Tensor]:
    x = torch.arange(float(sum(cuts))).view(1, 1, -1, 1).expand(1, 2, -1, 3).contiguous()
    stored = Stored(sum(cuts), limit, ram=ram)
    for rows in x.split(cuts, 2):
        stored.append(rows.clone())
    return stored, x


@pytest.mark.parametrize("height", [1, 2, 3, 7, 15, 31, 64, 65, 100, 127, 1024])
@pytest.mark.parametrize("limit", [1, 2, 3, 8, 13, 16, 57, 64])
def test_strips_cover_the_rows_and_are_equal_but_two(height: int, limit: int) -> None:
    cut = strips(height, limit)
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == height
    lengths = [stop - start for start, stop in cut]
    assert max(lengths) <= strip_rows(height, limit) <= limit
    assert limit < 2 or all(start % 2 == 0 for start, _ in cut), "of two rows, one is upsampled"
    assert len(set(lengths[1:-1])) <= 1
    if height % 8 == 0 and limit >= 16:
        assert lengths[0] == lengths[-1], "a third shape"
    if height % 16 == strip_rows(height, limit) % 16 == 0:
        halves = strips(height // 2, strip_rows(height, limit) // 2)
        assert halves == [(start // 2, stop // 2) for start, stop in cut], "for a downsampling"


@pytest.mark.parametrize(
    ("tokens", "rows"), [(64, 64), (4096, 4096), (16384, 4096), (65536, 8192), (65537, 8193)]
)
def test_queries_come_in_parts_that_fill_a_card(tokens: int, rows: int) -> None:
    assert query_rows(tokens) == rows


@pytest.mark.parametrize(
    "make_ram",
    [lambda: None, Ram, lambda: Ram(torch.empty(120, dtype=torch.uint8))],
    ids=["on the device", "not pinned", "half of it pinned"],
)
@pytest.mark.parametrize("cuts", [[9], [1] * 9, [3, 4, 2], [7, 1, 1]])
def test_reading_gives_what_was_stored(cuts: list[int], make_ram: Callable[[], Ram | None]) -> None:
    stored, x = _stored(4, cuts, make_ram())
    for runs in ([(0, 9)], [(0, 2), (1, 5), (4, 9)], [(row, row + 1) for row in range(9)]):
        for made, (first, last) in zip(_read(stored, runs), runs, strict=True):
            assert torch.equal(made, x[:, :, first:last])
    with ExitStack() as until:
        read = stored.open(until, drain=True)
        for first, last, keep in ((0, 4, 3), (3, 8, 6), (6, 9, 9)):
            assert torch.equal(torch.cat(read(first, last, keep), 2), x[:, :, first:last])
        with pytest.raises(ValueError, match="not complete or was drained"):
            stored.open(until, drain=True)


def test_a_map_in_one_tensor_is_read_as_views() -> None:
    stored, x = Stored(9, 4, is_one=True), torch.arange(54.0).view(1, 2, 9, 3)
    for rows in x.split([4, 4, 1], 2):
        stored.append(rows)
    [whole] = stored.on_device()
    with ExitStack() as until:
        [rows] = stored.open(until, drain=True)(3, 8, 7)
    assert torch.equal(rows, x[:, :, 3:8])
    assert rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("left", [0, 1, 9])
def test_a_drained_strip_is_free_before_the_next(left: int) -> None:
    """Of one row that is left, only a copy stays; of a long rest, once its strip was at work."""
    stored, x = _stored(20, [20, 20])
    seen = weakref.ref(stored.on_device()[0].untyped_storage())
    with ExitStack() as until:
        read = stored.open(until, drain=True)
        rows = read(0, 20, 20 - left)
        del rows
        if left == 9:
            assert seen() is not None, "a copy was held while its strip is"
            read(11, 12, 11)
        assert seen() is None
        assert torch.equal(torch.cat(read(20 - left, 40, 40), 2), x[:, :, 20 - left :])


def test_pipes_read_again() -> None:
    x = torch.randn(1, 2, 9, 3)
    piped = Piped(Whole(x), lambda until, is_last: _Double(), 2, 9)
    for _ in range(2):
        assert torch.equal(torch.cat(_read(piped, [(0, 2), (2, 9)]), 2), 2 * x)


def _conv(height: int, weight: torch.Tensor) -> Conv:
    return Conv(weight, None, height=height)


@pytest.mark.parametrize("stored_rows", [1, 2, 7, 12])
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_a_part_recomputes_the_other_rows(stored_rows: int, limit: int) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(1, 2, 13, 5), [torch.randn(2, 2, 3, 3) for _ in range(2)]
    remade = Piped(Whole(x), lambda until, is_last: _conv(13, weights[0]), 2, limit)
    remade = Piped(remade, lambda until, is_last: _conv(13, weights[1]), 2, limit)
    wanted = x
    for weight in weights:
        wanted = torch.nn.functional.conv2d(wanted, weight, padding=1)
    stored = Stored(stored_rows, limit)
    stored.append(wanted[:, :, :stored_rows].clone())
    part = Part(stored, remade)
    for drain in (False, True):
        made = torch.cat(_read(part, strips(13, limit), drain=drain), 2)
        assert (made - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match="not complete or was drained"):
        _read(part, [(0, 13)], drain=True)


def test_pinned_room_is_taken_in_a_ring() -> None:
    """A strip of 6, 6 and 4 in 14: what waits is never overwritten, and freed room is used."""
    ram = Ram(torch.zeros(14, dtype=torch.uint8))
    kept: list[RamStrip] = []

    def keep(count: int) -> bool:
        kept.append(ram.keep(torch.full((1, 1, count, 1), len(kept), dtype=torch.uint8)))
        return kept[-1]._piece is not None

    def drained(number: int) -> list[int]:
        strip = kept[number]
        made = strip.empty(strip.height)
        strip.copy_to(made[:, :, :1], 0)
        strip.copy_to(made[:, :, 1:], 1)
        strip.free()
        return made.flatten().tolist()

    assert [keep(count) for count in (6, 6, 4)] == [True, True, False]
    assert not keep(4)
    assert drained(0) == [0] * 6
    assert [keep(count) for count in (4, 2, 1)] == [True, True, False]  # before the second
    assert drained(4) == [4] * 4  # out of turn: its room waits for the second's
    assert not keep(1)
    assert drained(1) == [1] * 6
    assert [keep(count) for count in (8, 4, 1)] == [True, True, False]
    assert [drained(number) for number in (2, 5, 8, 9)] == [[2] * 4, [5] * 2, [8] * 8, [9] * 4]


class _Unwaited(TorchDispatchMode):
    """Notes copies to RAM that are not waited for, and who on the CPU reads what they bring.

    A copy between the card and RAM reads and writes on the stream if both sides are contiguous in
    one format; otherwise torch gathers the bytes on the CPU (copy_requires_temporaries in its
    aten/src/ATen/native/cuda/Copy.cu).
    """

    def __init__(self) -> None:
        super().__init__()
        self.brought: set[int] = set()
        self.read_early: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            into, rows = args[:2] if func is torch.ops.aten.copy_.default else (out, args[0])
            is_streamed = any(
                all(t.is_contiguous(memory_format=way) for t in (into, rows))
                for way in (torch.contiguous_format, torch.channels_last)
            )
            goes_on = (kwargs or {}).get("non_blocking") or args[2:] == (True,)
            if _is_from(rows, "cuda") and _is_from(into, "cpu") and goes_on:
                assert is_streamed, "gathered in RAM that is not pinned"
                self.brought.add(into.untyped_storage()._cdata)
            elif not (is_streamed and _is_from(into, "cuda")):
                self._note(func, [rows])
        elif func.namespace == "aten" and not func.is_view:
            self._note(func, [*args, *(kwargs or {}).values()])
        return out

    def _note(self, func: Any, given: list[Any]) -> None:
        for tensor in (t for t in given if isinstance(t, torch.Tensor) and _is_from(t, "cpu")):
            if tensor.untyped_storage()._cdata in self.brought:
                self.read_early.append(func)


def _is_from(tensor: torch.Tensor, device: str) -> bool:
    return tensor.device.type == device


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("is_pinned", [False, True])
def test_the_cpu_reads_no_strip_before_it_has_come(
    is_pinned: bool, memory_format: torch.memory_format
) -> None:
    """Rows of a contiguous strip were gathered on the CPU while the card still copied the strip."""
    with FakeTensorMode():
        rows = torch.ones(1, 2, 9, 3, device="cuda").contiguous(memory_format=memory_format)
        memory = torch.empty(432, dtype=torch.uint8) if is_pinned else None
        stored = Stored(18, 9, ram=Ram(memory))
        with _Unwaited() as copies:
            for _ in range(2):
                stored.append(rows)
            runs = list(pairwise(range(0, 19, 2)))
            made = [*_read(stored, runs), *_read(stored, runs, drain=True)]
    assert all(_is_from(rows, "cuda") for rows in made)
    assert bool(copies.brought) == is_pinned
    assert not copies.read_early


def test_errors() -> None:
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        strips(3, 0)
    with ExitStack() as until:
        with pytest.raises(ValueError, match="not complete"):
            Stored(3, 2).open(until, drain=False)
        stored, _ = _stored(4, [4])
        made = Piped(stored, lambda until, is_last: _Double(), 2, 4)
        with pytest.raises(ValueError, match="a joined map can be read once, with drain"):
            Joined(made, stored).open(until, drain=False)
    with pytest.raises(ValueError, match="the map has 1 rows less than were appended"):
        Stored(3, 2).append(torch.ones(1, 1, 4, 2))
