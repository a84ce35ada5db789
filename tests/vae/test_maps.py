"""Maps as strips: what they give, and what they keep."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pack.nodes.vae.cuts import even_runs, longest_strip, query_rows
from pack.nodes.vae.maps import Part, Piped, Stored, Whole
from pack.nodes.vae.ram import Ram, RamStrip
from pack.nodes.vae.strips import Conv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Double:
    """A stage that holds nothing back."""

    def push(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * rows


def _stored(limit: int, cuts: list[int], ram: Ram | None = None) -> tuple[Stored, torch.Tensor]:
    x = torch.arange(float(sum(cuts))).view(1, 1, -1, 1).expand(1, 2, -1, 3).contiguous()
    stored = Stored(sum(cuts), limit, ram=ram)
    for rows in x.split(cuts, 2):
        stored.append(rows.clone())
    return stored, x


@pytest.mark.parametrize("height", [1, 2, 3, 7, 64, 65])
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_runs_cover_the_rows_and_differ_by_one(height: int, limit: int) -> None:
    runs = even_runs(height, limit)
    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
    assert runs[-1][1] == height
    lengths = {stop - start for start, stop in runs}
    assert max(lengths) <= limit + 2
    assert max(lengths) - min(lengths) <= 1
    # The window of a convolution: what the stage before held back, and a row above and below.
    assert longest_strip(height, limit) == max(lengths) + 2 + 2


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
    for limit in (2, 4, 100):
        strips = list(stored.read(limit, drain=False))
        assert torch.equal(torch.cat(strips, 2), x)
        assert max(s.shape[2] for s in strips) <= max(limit + 2, 1)
    assert torch.equal(torch.cat(list(stored.read(4, drain=True)), 2), x)
    with pytest.raises(ValueError, match="not complete or was drained"):
        next(stored.read(4, drain=True))


def test_a_drained_strip_is_free_before_the_next() -> None:
    stored, _ = _stored(4, [4, 4])
    strips = stored.read(4, drain=True)
    first = next(strips)
    seen = weakref.ref(first)
    del first
    next(strips)
    assert seen() is None


def test_pipes_read_again() -> None:
    x = torch.randn(1, 2, 9, 3)
    piped = Piped(Whole(x), lambda until, is_last, height: _Double(), 2)
    for _ in range(2):
        assert torch.equal(torch.cat(list(piped.read(2, drain=False)), 2), 2 * x)


def _conv(height: int, weight: torch.Tensor) -> Conv:
    return Conv(weight, None, height=height)


@pytest.mark.parametrize("stored_rows", [1, 2, 7, 12])
@pytest.mark.parametrize("limit", [1, 3, 64])
def test_a_part_recomputes_the_other_rows(stored_rows: int, limit: int) -> None:
    """Begun late, the rows above are made too, and dropped: their edge is not the map's."""
    torch.manual_seed(0)
    x, weights = torch.randn(1, 2, 13, 5), [torch.randn(2, 2, 3, 3) for _ in range(2)]
    remade = Piped(Whole(x), lambda until, last, height: _conv(height, weights[0]), 2, reach=1)
    remade = Piped(remade, lambda until, last, height: _conv(height, weights[1]), 2, reach=1)
    wanted = x
    for weight in weights:
        wanted = torch.nn.functional.conv2d(wanted, weight, padding=1)
    stored = Stored(stored_rows, limit)
    stored.append(wanted[:, :, :stored_rows].clone())
    part = Part(stored, remade)
    for drain in (False, True):
        made = torch.cat(list(part.read(limit, drain=drain)), 2)
        assert (made - wanted).abs().max() < 1e-5
    with pytest.raises(ValueError, match="not complete or was drained"):
        next(part.read(limit, drain=True))


def test_pinned_room_is_taken_in_a_ring() -> None:
    """A strip of 6, 6 and 4 in 14: what waits is never overwritten, and freed room is used.

    Room is free behind the last run of a strip; what was read before stays as it was.
    """
    ram = Ram(torch.zeros(14, dtype=torch.uint8))
    kept: list[RamStrip] = []

    def keep(count: int) -> bool:
        kept.append(ram.keep(torch.full((1, 1, count, 1), len(kept), dtype=torch.uint8)))
        return kept[-1]._piece is not None

    def drained(number: int) -> list[int]:
        strip = kept[number]
        made = list(strip.read([(0, 1), (1, strip.height)], drain=True))
        return torch.cat(made, 2).flatten().tolist()

    assert [keep(count) for count in (6, 6, 4)] == [True, True, False]
    reader = kept[0].read([(0, 1), (1, 6)], drain=True)
    runs = [next(reader)]
    assert not keep(4)  # five rows of the first are still to be read
    runs += reader
    assert [keep(count) for count in (4, 2, 1)] == [True, True, False]  # before the second
    assert torch.cat(runs, 2).flatten().tolist() == [0] * 6
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
            strips = [*stored.read(2, drain=False), *stored.read(2, drain=True)]
    assert all(_is_from(strip, "cuda") for strip in strips)
    assert bool(copies.brought) == is_pinned
    assert not copies.read_early


def test_errors() -> None:
    x = torch.ones(1, 1, 4, 2)
    doubled = Piped(Whole(x), lambda until, is_last, height: _Double(), 1, 2)
    with pytest.raises(ValueError, match="only a map of its source's size"):
        next(doubled.read_from(1, 2))
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        even_runs(3, 0)
    with pytest.raises(ValueError, match="not complete"):
        next(Stored(3, 2).read(2, drain=False))
    with pytest.raises(ValueError, match="the map has 1 rows less than were appended"):
        Stored(3, 2).append(torch.ones(1, 1, 4, 2))
