"""The tracker's bytes against sums done by hand, and against the profiler's allocator events."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.testing.tracker import Lifetime, Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F  # noqa: N812

KIND = ["real", "fake"]
GRAD = [torch.no_grad, torch.inference_mode]


@pytest.fixture(params=KIND)
def tensors(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on real tensors, then on fake ones."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield request.param


@pytest.fixture(params=GRAD, ids=["no_grad", "inference_mode"])
def without_grad(request: pytest.FixtureRequest) -> Iterator[None]:
    with request.param():
        yield


def test_an_empty_block_holds_nothing(tensors: str) -> None:
    with PeakTracker() as tracker:
        pass
    assert (tracker.current_bytes, tracker.peak_bytes, tracker.peak_op) == (0, 0, "")


def test_chain_of_operations(tensors: str) -> None:
    x = torch.zeros(10)
    with PeakTracker() as tracker:
        a = x + 1  # 40
        b = torch.cat((a, a))  # 40 + 80
        del a  # 80
        c = b.to(torch.bfloat16)  # 80 + 40
        assert tracker.current_bytes == 120
        del b
        assert tracker.current_bytes == 40
        d = c.float() * c.float()  # 40 + 80 + 80, + 80
    assert tracker.peak_bytes == 280
    assert tracker.peak_op == "aten.mul.Tensor"
    assert [a.nbytes for a in tracker.peak_live] == [40, 80, 80, 80]
    assert tracker.current_bytes == 120
    del c, d
    assert tracker.current_bytes == 0


def test_views_and_in_place_results_add_nothing(tensors: str) -> None:
    x = torch.zeros(4, 6)
    with PeakTracker() as tracker:
        x.view(24)[2:].add_(1)
        x.t().unsqueeze(0).expand(3, 6, 4)
        assert tracker.peak_bytes == 0
        y = x + 1
        parts = y.split(2)
        y.mul_(2)
        torch.add(x, 1, out=y)
        del y
        assert tracker.current_bytes == 96, "a view keeps its whole storage"
        del parts
    assert (tracker.current_bytes, tracker.peak_bytes) == (0, 96)


def test_a_reshape_counts_where_it_copies(tensors: str, without_grad: None) -> None:
    x = torch.zeros(4, 6)
    with PeakTracker() as tracker:
        x.reshape(6, 4)
        x.contiguous()
        x.to(torch.float32)
        assert tracker.peak_bytes == 0
        x.t().reshape(24)
        assert tracker.peak_bytes == 96
        x.t().contiguous(), x.double()
    assert tracker.peak_bytes == 96 + 192


def test_linear_of_three_dimensions(tensors: str, without_grad: None) -> None:
    x, weight, bias = torch.zeros(2, 5, 8), torch.zeros(16, 8), torch.zeros(16)
    with PeakTracker() as tracker:
        y = F.linear(x, weight)
        z = F.linear(x, weight, bias)
    assert tracker.current_bytes == tracker.peak_bytes == 2 * (2 * 5 * 16 * 4)
    assert y.shape == z.shape


def test_silu_gate_of_a_feed_forward(tensors: str, without_grad: None) -> None:
    x = torch.zeros(3, 8)
    w1, w2, w3 = torch.zeros(32, 8), torch.zeros(8, 32), torch.zeros(32, 8)
    with PeakTracker() as tracker:
        y = F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)
    # silu's input is gone when the second product begins: silu, w3 x and their product.
    assert tracker.peak_bytes == 3 * (3 * 32 * 4)
    assert tracker.current_bytes == y.numel() * 4


def test_inner_steps_of_rms_norm_count(tensors: str) -> None:
    x, weight = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    peaks = []
    for grad in GRAD:
        with grad(), PeakTracker() as tracker:
            F.rms_norm(x, (8,), weight)
        peaks.append(tracker.peak_bytes)
    assert peaks[0] == peaks[1], "inference_mode hides the steps of composite operations"
    assert peaks[0] >= 2 * (4 * 8 * 4), "the norm works on float32 copies"


def test_flash_attention_counts_output_and_logsumexp(tensors: str, without_grad: None) -> None:
    heads, queries, dim = 3, 64, 32
    q, k, v = (torch.zeros(2, heads, queries, dim, dtype=torch.bfloat16) for _ in range(3))
    for attention in (None, "flash"):
        with Tracker(attention=attention) as tracker:
            out = F.scaled_dot_product_attention(q, k, v)
        assert tracker.peak_bytes == 2 * heads * queries * dim * 2 + 2 * heads * queries * 4
        assert tracker.current_bytes == out.numel() * 2
        del out


def test_math_attention_counts_its_scores(tensors: str, without_grad: None) -> None:
    heads, length, dim = 3, 64, 8
    q, k, v = (torch.zeros(1, heads, length, dim) for _ in range(3))
    with Tracker(attention="math") as tracker:
        F.scaled_dot_product_attention(q, k, v)
    scores = heads * length * length
    # The scaled q; scores and softmax; a byte per score and per row that asks for minus infinity
    # everywhere, and the zero such rows would get.
    assert tracker.peak_bytes == heads * length * dim * 4 + 2 * scores * 4 + scores + 3 * length + 4


def test_forced_kernel_raises_where_it_cannot_run(tensors: str) -> None:
    q = torch.zeros(1, 2, 16, 8)
    mask = torch.zeros(2, 16, 16)
    with (
        pytest.warns(UserWarning),
        pytest.raises(RuntimeError, match="No available kernel"),
        Tracker(attention="flash"),
    ):
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    F.scaled_dot_product_attention(q, q, q, attn_mask=mask)  # torch's choice is back


def test_only_watched_tensors_of_before_count(tensors: str) -> None:
    x, y = torch.zeros(8), torch.zeros(16)
    with Tracker() as tracker:
        tracker.watch(x, x.view(2, 4))
        assert tracker.current_bytes == 32
        z = x + 1
        y.add_(1)
        del x
        assert tracker.current_bytes == 32
    assert tracker.peak_bytes == 64
    assert [a.op for a in tracker.peak_live] == ["watch", "aten.add.Tensor"]
    del z


def test_data_lifted_from_python_counts(tensors: str) -> None:
    with PeakTracker() as tracker:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert tracker.current_bytes == 12
        del x
    assert (tracker.current_bytes, tracker.peak_bytes) == (0, 12)


def test_a_grown_storage_counts_its_new_size(tensors: str) -> None:
    with Tracker(log=True) as tracker:
        x = torch.empty(0)
        torch.add(torch.ones(5), 1, out=x)
        assert tracker.current_bytes == 20
        x.resize_(50)
        assert tracker.current_bytes == 200
        del x
    assert tracker.current_bytes == 0
    assert [e.nbytes for e in tracker.sequence()] == [0, 20, 20, 200]


def test_a_shrunk_storage_counts_its_new_size(tensors: str) -> None:
    with Tracker(log=True) as tracker:
        x = torch.ones(50)
        x.resize_(5)
        assert tracker.current_bytes == 200, "fewer elements, but the same storage"
        x.untyped_storage().resize_(20)
        x.add_(1)
        assert (tracker.current_bytes, tracker.peak_bytes) == (20, 200)
        del x
    assert tracker.current_bytes == 0
    assert [e.nbytes for e in tracker.sequence()] == [200, 20]


def test_what_autograd_saves_stays_counted() -> None:
    x = torch.ones(8, requires_grad=True)
    with PeakTracker() as tracker:
        y = x.exp().exp()
        assert tracker.current_bytes == 64, "exp saves its result, which no name holds"
        y.sum().backward()
        del y
        gc.collect()
    assert x.grad is not None
    assert tracker.current_bytes == x.grad.numel() * 4


def test_sequence_names_size_and_lifetime(tensors: str) -> None:
    x = torch.zeros(4)
    with Tracker(log=True) as tracker:
        a = x + 1  # tick 0
        b = a + 1  # tick 1
        del a  # tick 2
        c = b.double()  # tick 3
    assert tracker.sequence() == (Lifetime(16, 2), Lifetime(16, None), Lifetime(32, None))
    assert [e.op for e in tracker.log] == ["aten.add.Tensor"] * 2 + ["aten._to_copy.default"]
    assert [e.nbytes for e in tracker.live()] == [16, 32]
    del b, c
    assert tracker.sequence()[1:] == (Lifetime(16, None), Lifetime(32, None)), "log is closed"
    assert tracker.live() == ()


def _sequences(call: Callable[[], object]) -> list[tuple[Lifetime, ...]]:
    found = []
    for _ in range(2):
        with Tracker(log=True) as tracker:
            out = call()
        found.append(tracker.sequence())
        del out
    return found


def test_equal_calls_have_equal_sequences_and_a_kept_buffer_shows(tensors: str) -> None:
    x = torch.zeros(64, 64)

    def steady() -> torch.Tensor:
        return (x @ x).relu() + x

    kept: dict[str, torch.Tensor] = {}

    def caching() -> torch.Tensor:
        if "table" not in kept:
            kept["table"] = x.cos()
        return x * kept["table"]

    first, second = _sequences(steady)
    assert first == second
    first, second = _sequences(caching)
    assert first != second
    assert sum(life.ticks is None for life in first) == 2, "table and output outlive the call"


def test_sequence_needs_a_log() -> None:
    with pytest.raises(ValueError, match=r"needs Tracker\(log=True\)"):
        Tracker().sequence()


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="attention must be flash, efficient, math or None"):
        Tracker(attention="sage")  # type: ignore[arg-type]


def test_trace_names_the_calling_line(tensors: str) -> None:
    with PeakTracker(trace=True) as tracker:
        torch.nn.Linear(2, 3)
        x = torch.zeros(1000)
    assert tracker.peak_op == "aten.zeros.default"
    where = tracker.peak_live[-1].where
    assert where.startswith("test_tracker.py:")
    assert where.endswith("test_trace_names_the_calling_line")
    del x


@torch.library.custom_op("z_image_tests::twice_rounded", mutates_args=())
def _twice_rounded(x: torch.Tensor) -> torch.Tensor:
    return (x.double() * 2).to(x.dtype)


@_twice_rounded.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_opened_custom_operation_shows_its_temporaries(tensors: str, without_grad: None) -> None:
    x = torch.zeros(100)
    with Tracker() as closed:
        _twice_rounded(x)
    with Tracker(opened=["z_image_tests"]) as opened:
        y = _twice_rounded(x)
    assert closed.peak_bytes == 400
    assert opened.peak_bytes == 800 + 800
    assert opened.current_bytes == y.nbytes == 400


def _profiled_peak(call: Callable[[], object]) -> int:
    """Peak of the allocator's own events, from the profiler, in bytes."""
    with torch.profiler.profile(profile_memory=True) as profile:
        out = call()
    del out
    current = peak = 0
    # The profiler's list of raw allocator events, in time order.
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


def _norm_and_feed_forward(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    w1, w2, w3 = torch.randn(96, 32), torch.randn(32, 96), torch.randn(96, 32)
    normed = F.rms_norm(x, (32,), None, 1e-5)
    q, k, v = F.linear(normed, w1).split(32, dim=-1)
    mixed = x + (q * k).tanh() + v
    return x + F.linear(F.silu(F.linear(mixed, w1)) * F.linear(mixed, w3), w2)


def _gates_in_bfloat16(x: torch.Tensor) -> torch.Tensor:
    # No product of matrices: on a CPU those of bfloat16 have a workspace, which no tracker sees.
    gates = torch.cat((x, x.float().tanh().bfloat16(), x), dim=-1).repeat(1, 3, 1)
    a, b, c = gates.chunk(3, dim=-1)
    return F.silu(a) * b.contiguous() + c.transpose(1, 2).reshape(b.shape).mul_(b)


@pytest.mark.parametrize(
    ("block", "dtype"),
    [(_norm_and_feed_forward, torch.float32), (_gates_in_bfloat16, torch.bfloat16)],
)
def test_equals_the_allocators_own_events(
    block: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, without_grad: None
) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 48, 32).to(dtype)
    expected = _profiled_peak(lambda: block(x))
    with PeakTracker() as tracker:
        block(x)
    assert expected > x.nbytes
    assert tracker.peak_bytes == expected


def test_a_quantised_wrapper_counts_its_inner_tensors() -> None:
    wrapper = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor
    x: Any = wrapper(torch.zeros(8), torch.zeros(8))
    with Tracker() as tracker:
        y = x + 1
        assert tracker.current_bytes == 2 * 32
        tracker.watch(x)
        assert tracker.current_bytes == 4 * 32
        del y
    assert tracker.current_bytes == 2 * 32


def test_an_error_leaves_neither_the_tracker_nor_its_kernel_behind():
    enabled = torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(RuntimeError, match="inside"), Tracker(attention="math") as tracker:
        assert not torch.backends.cuda.flash_sdp_enabled()
        raise RuntimeError("inside")
    assert torch.backends.cuda.flash_sdp_enabled() == enabled
    kept = torch.ones(1000)
    assert (tracker.current_bytes, kept.numel()) == (0, 1000)


def test_only_what_is_on_a_device_counts() -> None:
    """Storages of fake tensors do not say where they are; the tensors do."""
    with FakeTensorMode(), Tracker(on="meta") as tracker:
        here = torch.empty(100, device="cpu")
        assert tracker.current_bytes == 0
        there = here.to("meta")
        assert tracker.current_bytes == there.nbytes == 400
