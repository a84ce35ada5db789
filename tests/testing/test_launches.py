"""The counter of launches, on a handful of operations whose counts are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pack.testing.launches import Counts, Launches
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional

pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch with CUDA")
KIB = 1024


def counted(run: Callable[[torch.Tensor], object]) -> Launches:
    """Runs on a fake tensor [16, 32] of 1 KiB on a card, as the host runs nodes."""
    with torch.inference_mode(), FakeTensorMode(shape_env=ShapeEnv()):  # has values to ask for
        x = torch.empty(16, 32, dtype=torch.bfloat16, device="cuda")
        with Launches() as seen:
            run(x)
    return seen


def square(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(32, 32)  # 2 KiB


def attention(x: torch.Tensor) -> torch.Tensor:
    q = x.view(1, 1, 16, 32)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)[0]


def moved(launches: int, nbytes: int) -> Counts:
    return Counts(launches, moved_bytes=nbytes, row_bytes=nbytes)


# Of [16, 32] and [32, 32], which is the weight.
PRODUCT = Counts(1, moved_bytes=4 * KIB, row_bytes=2 * KIB, flops=2 * 16 * 32 * 32)
LAUNCHED = {
    "in place": (lambda x: x.add_(x), moved(1, 3 * KIB)),
    "new": (lambda x: x + 1, moved(1, 2 * KIB)),
    "filled": (lambda x: x.zero_(), moved(1, KIB)),
    "copied": (lambda x: x.copy_(x.clone()), moved(2, 4 * KIB)),
    "broadcast": (lambda x: x + x[:1].clone().expand(16, 32), moved(2, 2 * KIB + KIB // 16 * 3)),
    "gathered": (
        lambda x: x.index_select(0, torch.empty(4, dtype=torch.int64, device="cuda")),
        moved(1, KIB // 2),
    ),
    "product": (lambda x: x @ square(x), PRODUCT),
    "out=": (lambda x: torch.mm(x, square(x), out=torch.empty_like(x)), PRODUCT),
    "layer": (lambda x: functional.linear(x, square(x)), PRODUCT),
    "layout": (lambda x: x.t().contiguous(), moved(1, 2 * KIB)),
    "folded": (lambda x: x.view(16, 2, 16).transpose(0, 1).reshape(2, 256), moved(1, 2 * KIB)),
}  # fmt: skip


@pytest.mark.parametrize("case", LAUNCHED)
def test_launches_bytes_and_arithmetic_are_counted(case: str):
    run, wanted = LAUNCHED[case]
    assert counted(run).counts == wanted


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x[2:].t().detach().unsqueeze(0).expand(2, 32, 14),
        lambda x: (torch.empty_like(x), x.new_empty(3), torch.empty(2, device="cuda")),
        lambda x: torch.zeros(4) + torch.ones(4),
        lambda x: x.device,
    ],
    ids=["views", "allocations", "cpu", "asked"],
)
def test_what_starts_no_kernel_is_no_launch(run: Callable[[torch.Tensor], object]):
    seen = counted(run)
    assert seen.counts == Counts()
    assert not seen.operations


@pytest.mark.parametrize(
    ("run", "waits", "copied_bytes"),
    [
        (lambda x: x.cpu(), 1, KIB),
        (lambda x: x.to("cpu", non_blocking=True), 0, KIB),
        (lambda x: torch.empty(16, 32, dtype=x.dtype).copy_(x), 1, KIB),
        (lambda x: torch.empty(16, 32, dtype=x.dtype).copy_(x, non_blocking=True), 0, KIB),
        (lambda x: torch.empty(8).to("cuda"), 1, 32),
        (lambda x: x.float().to(x.device), 0, 0),
    ],
    ids=["cpu()", "to", "copy_", "copy_ later", "from the CPU", "on the card"],
)
def test_a_blocking_copy_is_a_host_wait(
    run: Callable[[torch.Tensor], object], waits: int, copied_bytes: int
):
    found = counted(run).counts
    assert (found.host_waits, found.copied_bytes, found.launches) == (waits, copied_bytes, 1)


@pytest.mark.parametrize("run", [lambda x: x[0, 0].item(), torch.nonzero], ids=["item", "nonzero"])
def test_what_asks_for_values_is_a_host_wait(run: Callable[[torch.Tensor], object]):
    assert counted(run).counts.host_waits == 1


def test_attention_is_one_launch_with_its_arithmetic():
    seen = counted(attention)
    assert seen.counts.launches == 1
    assert seen.counts.flops == 2 * 2 * 16 * 16 * 32


def test_convolutions_count_by_shape_and_launch_their_bias_apart():
    def run(x: torch.Tensor) -> None:
        maps, weight = x.view(1, 2, 16, 16), x.new_empty(4, 2, 3, 3)
        for _ in range(2):
            functional.conv2d(maps, weight, padding=1)
        functional.conv2d(maps[:, :, :8], weight, x.new_empty(4), padding=1)

    seen = counted(run)
    assert seen.operations == {"aten.convolution": 4}
    assert seen.counts.launches == 4
    assert {given[2] for given, _ in seen.convolutions} == {16, 8}


def test_synchronising_is_a_host_wait_and_the_function_is_put_back():
    own = torch.cuda.Event.synchronize

    def run(x: torch.Tensor) -> None:
        with pytest.raises(Exception):  # noqa: B017 no driver, or an event that was never recorded
            torch.cuda.synchronize("no device")

    assert counted(run).counts.host_waits == 1
    assert torch.cuda.Event.synchronize is own
