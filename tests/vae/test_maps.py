"""Maps as strips: what they give, and what they keep."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from pack.nodes.vae.cuts import even_runs, longest_strip, query_rows
from pack.nodes.vae.maps import Part, Piped, Stored, Whole
from pack.nodes.vae.strips import Conv
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Double:
    """A stage that holds nothing back."""

    def push(self, rows: torch.Tensor) -> torch.Tensor:
        return 2 * rows


def _stored(limit: int, cuts: list[int], **options: bool) -> tuple[Stored, torch.Tensor]:
    x = torch.arange(float(sum(cuts))).view(1, 1, -1, 1).expand(1, 2, -1, 3).contiguous()
    stored = Stored(sum(cuts), limit, **options)
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


@pytest.mark.parametrize("in_ram", [False, True])
@pytest.mark.parametrize("cuts", [[9], [1] * 9, [3, 4, 2], [7, 1, 1]])
def test_reading_gives_what_was_stored(cuts: list[int], in_ram: bool) -> None:
    stored, x = _stored(4, cuts, in_ram=in_ram)
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


class _Copies(TorchDispatchMode):
    """Notes of each copy between tensors whether it returns before it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.are_non_blocking: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.are_non_blocking.append(args[2] if len(args) > 2 else False)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("can_pin", [False, True])
def test_strips_lie_in_ram_that_is_not_pinned_where_none_can_be_had(
    monkeypatch: pytest.MonkeyPatch, can_pin: bool
) -> None:
    """The error counted as out of memory on the card: smaller strips, then the host's tiles."""
    empty_like = torch.empty_like

    def pinning(rows: torch.Tensor, *, device: str, pin_memory: bool = False) -> torch.Tensor:
        if pin_memory and not can_pin:
            raise RuntimeError("CUDA error: out of memory")
        return empty_like(rows, device=device)

    monkeypatch.setattr(torch, "empty_like", pinning)
    stored = Stored(4, 4, in_ram=True)
    with FakeTensorMode():
        rows = torch.ones(1, 2, 4, 3, device="cuda")
        with _Copies() as copies:
            stored.append(rows)
        assert stored._strips[0].device.type == "cpu"
        assert next(stored.read(4, drain=True)).device.type == "cuda"
    assert copies.are_non_blocking == [can_pin]


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
