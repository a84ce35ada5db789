"""What mode auto decides, and what is said about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.nodes.probe.tracker import PeakTracker
from pack.testing import attention_models as models
from pack.testing.stock_forward import FakeDenoiser
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import cuda

pytestmark = pytest.mark.usefixtures("host")

# Z-Image at 1024x1024 with 256 text tokens.
HEADS, TOKENS, CHANNELS = 30, 4352, 128
ONCE_AND_SLOW = (pytest.mark.once, pytest.mark.slow)
WITH_SCORES = ["attention_basic", "attention_split", "attention_sub_quad"]


@pytest.fixture(scope="module")
def model(host: Any) -> Any:
    return models.patcher(torch.nn.Linear(1, 1))


class Counter(models.Recorder):
    """Counts slices; to mode auto an override of ours, so that it does not stand aside."""

    is_foreign = False

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return [shape for _, shape, _ in self.seen]


def _counted(model: Any) -> tuple[Counter, dict[str, Any]]:
    """Who counts the slices, and keywords for a call under mode auto."""
    counter = Counter()
    patched = models.sliced(models.with_override(model, counter))
    return counter, {"skip_reshape": True, "transformer_options": models.options(patched)}


@pytest.mark.parametrize("name", WITH_SCORES)
@pytest.mark.parametrize(
    ("tokens", "slices"),
    [(TOKENS, 30), pytest.param(128 * 128 + 256, HEADS * 9, marks=ONCE_AND_SLOW)],
)
def test_auto_keeps_score_buffers_within_the_budget(
    model: Any, name: str, tokens: int, slices: int
) -> None:
    from pack.nodes.attention.budget import BUDGET_BYTES

    counter, options = _counted(model)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, HEADS, tokens, CHANNELS, dtype=torch.bfloat16) for _ in range(3))
        with PeakTracker() as tracker:
            models.function(name)(q, k, v, HEADS, **options)
    assert tracker.peak_bytes <= BUDGET_BYTES + HEADS * tokens * CHANNELS * 2
    assert len(counter.shapes) == slices


@pytest.fixture(scope="module")
def denoiser(host: Any) -> FakeDenoiser:
    return FakeDenoiser(dataclasses.replace(Z_IMAGE, layers=2), device="cpu")


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(Request(1024, 1024), id="1024 b1"),
        pytest.param(Request(2048, 2048), id="2048 b1", marks=ONCE_AND_SLOW),
        pytest.param(Request(1024, 1024, 4), id="1024 b4", marks=ONCE_AND_SLOW),
    ],
)
def test_a_whole_forward_holds_no_more_than_with_fused_attention(
    denoiser: FakeDenoiser, request_: Request
) -> None:
    """Z-Image with the host's sub-quadratic attention: with auto the feed-forward is the peak.

    With memory to spare the stock peaks are 2238, 8652 and 8913 MiB, with auto 485, 1922 and 1913.
    """
    fused = denoiser.measure(request_).peak_bytes
    patcher = denoiser.patcher()
    models.options(patcher).pop("optimized_attention_override", None)
    stock = denoiser.measure(request_, patcher=patcher).peak_bytes
    assert stock > fused  # by how much depends on the machine's free memory
    assert denoiser.measure(request_, patcher=models.sliced(patcher)).peak_bytes == fused


def test_auto_slices_the_math_kernel_and_leaves_the_fused_one(model: Any) -> None:
    args = [torch.randn(1, 8, 1536, 64) for _ in range(3)]
    counter, options = _counted(model)
    models.function("attention_pytorch")(*args, 8, **options)
    assert counter.shapes == [(1, 8, 1536, 64)]
    enabled = cuda.flash_sdp_enabled()
    cuda.enable_flash_sdp(False)
    try:
        models.function("attention_pytorch")(*args, 8, **options)
    finally:
        cuda.enable_flash_sdp(enabled)
    assert counter.shapes[1:] == [(1, 4, 1536, 64)] * 2  # as diffusers' "auto": two halves


def test_auto_leaves_small_calls_whole(model: Any) -> None:
    args = [torch.randn(1, 8, 512, 64) for _ in range(3)]
    counter, options = _counted(model)
    models.function("attention_basic")(*args, 8, **options)
    assert counter.shapes == [(1, 8, 512, 64)]


def test_auto_leaves_an_override_of_another_pack_whole(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    seen: list[int] = []

    def theirs(function: Any, q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> Any:
        seen.append(heads)
        return function(q, k, v, heads, **kwargs)

    clone = models.with_override(model, theirs)
    args = [torch.randn(1, 8, 2048, 64) for _ in range(3)]
    for mode, wanted in (("auto", [8]), ("heads", [4, 4])):
        for nodes in (1, 2):  # a second node of ours does not hide theirs
            patched = models.sliced(clone, mode)
            if nodes == 2:
                patched = models.sliced(patched, "auto")
            seen.clear()
            options = {"skip_reshape": True, "transformer_options": models.options(patched)}
            models.function("attention_basic")(*args, 8, **options)
            assert seen == wanted
    assert "auto: an override of another pack computes the attention" in caplog.text
    assert "the attention override of another pack: its buffers are unknown" in caplog.text


def test_each_kind_of_decision_is_logged_once(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    options = models.options(models.sliced(model))
    args = [torch.randn(1, 8, 2048, 64) for _ in range(3)]
    for _ in range(3):
        for name in ("attention_basic", "attention_pytorch"):
            models.function(name)(*args, 8, skip_reshape=True, transformer_options=options)
    said = [m for m in caplog.messages if m.startswith("Attention Slice: ")]
    assert len(said) == 3 and said[0].startswith("Attention Slice: auto: attention_sub_quad on cpu")
    assert "attention_basic: 3 of 8 heads at a time, buffers 268 -> 100 MiB" in caplog.text
    assert "PyTorch's fused attention: holds no scores, nothing to slice" in caplog.text


def test_a_forced_mode_says_what_it_does_not_save(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    args = [torch.randn(1, 8, 256, 64) for _ in range(3)]
    options = {
        "skip_reshape": True,
        "transformer_options": models.options(models.sliced(model, "max")),
    }
    models.function("attention_pytorch")(*args, 8, **options)
    wanted = "1 of 8 heads at a time; it holds no scores, so this alone saves nothing"
    assert f"PyTorch's fused attention: {wanted}" in caplog.text
