"""The host's attention functions, sliced: every layout, mask and dtype gives the same result."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.testing import attention_models as models
from pack.testing.attention_models import BATCH, HEADS, KEYS, QUERIES
from torch._subclasses.fake_tensor import FakeTensorMode

# Those that run on a CPU; sage and flash take their own fallback there.
FUNCTIONS = [
    "attention_pytorch",
    "attention_basic",
    "attention_split",
    "attention_sub_quad",
    "attention_sage",
    "attention3_sage",
    "attention_flash",
]
SETTINGS = [("max", 0), ("heads", 4), ("queries", 64), ("queries", 0)]

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    # With several threads a product of one matrix is split otherwise than one of several: the last
    # bit of attention_basic, _split and _sub_quad then depends on the number of heads.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(host: Any) -> Any:
    return models.patcher(torch.nn.Linear(1, 1))


def _check(name: str, model: Any, args: Any, options: Any) -> dict[tuple[str, int], int]:
    """Compares sliced calls with the plain one; returns into how many calls each setting cut it."""
    whole = models.function(name)(*args, HEADS, **options)
    before = [t.clone() for t in args]
    calls = {}
    for mode, size in SETTINGS:
        recorder = models.Recorder()
        sliced = models.options(models.sliced(models.with_override(model, recorder), mode, size))
        got = models.function(name)(*args, HEADS, **options, transformer_options=sliced)
        assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
        assert got.shape == whole.shape and got.dtype == whole.dtype
        if mode == "queries":  # blocks of another size in the CPU's kernels
            rounding = 8 * torch.finfo(whole.dtype).eps
            torch.testing.assert_close(got, whole, rtol=rounding, atol=rounding)
        else:
            assert torch.equal(got, whole), (mode, size)
        assert {function for function, _, _ in recorder.seen} == {name}
        calls[mode, size] = len(recorder.seen)
    return calls


MASKS = {
    "none": None,
    "2 axes": (QUERIES, KEYS),
    "3 axes": (BATCH, QUERIES, KEYS),
    "4 axes": (BATCH, HEADS, QUERIES, KEYS),
    "4 axes, one head": (BATCH, 1, QUERIES, KEYS),
    "4 axes, keys only": (BATCH, 1, 1, KEYS),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_layouts_and_cross_attention(
    model: Any, shape: tuple[int, ...] | None, name: str
) -> None:
    mask = None if shape is None else models.draw(*shape, seed=3)
    for skip_reshape, skip_output_reshape in itertools.product((False, True), repeat=2):
        options = {"mask": mask, "skip_reshape": skip_reshape}
        options["skip_output_reshape"] = skip_output_reshape
        args = models.inputs(skip_reshape=skip_reshape)
        calls = _check(name, model, args, options)
        assert calls == {("max", 0): 6, ("heads", 4): 2, ("queries", 64): 3, ("queries", 0): 2}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("precision", [None, torch.float32])
def test_half_precision(model: Any, name: str, precision: Any) -> None:
    args = models.inputs(skip_reshape=True, dtype=torch.bfloat16)
    options = {"skip_reshape": True, "attn_precision": precision}
    assert min(_check(name, model, args, options).values()) > 1


@pytest.mark.parametrize("shape", [(QUERIES, KEYS), (BATCH, 1, 1, KEYS)])
def test_bool_masks(model: Any, shape: tuple[int, ...]) -> None:
    mask = models.draw(*shape, seed=3) > -0.5
    options = {"skip_reshape": True, "mask": mask}
    calls = _check("attention_pytorch", model, models.inputs(skip_reshape=True), options)
    assert min(calls.values()) > 1


@pytest.mark.parametrize("shape", [(BATCH, KEYS), (BATCH, 1, 1, KEYS)])
def test_bool_masks_of_attention_basic_are_by_sample_and_key(
    model: Any, shape: tuple[int, ...]
) -> None:
    mask = models.draw(*shape, seed=3) > -0.5
    options = {"skip_reshape": True, "mask": mask}
    calls = _check("attention_basic", model, models.inputs(skip_reshape=True), options)
    assert min(calls.values()) > 1


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_shared_keys_and_values(model: Any, kv_heads: int, name: str) -> None:
    import comfy.ops

    if not hasattr(comfy.ops, "repeat_kv_for_gqa"):
        pytest.skip("this host's attention functions do not share keys and values")
    masks = (None, models.draw(BATCH, HEADS, QUERIES, KEYS, seed=3))
    for skip_reshape, mask in itertools.product((False, True), masks):
        args = models.inputs(skip_reshape=skip_reshape, kv_heads=kv_heads)
        options = {"enable_gqa": True, "skip_reshape": skip_reshape, "mask": mask}
        assert min(_check(name, model, args, options).values()) > 1


@pytest.mark.parametrize("name", ["attention_basic", "attention_split", "attention_sub_quad"])
def test_score_buffers_shrink_with_the_slices(model: Any, name: str) -> None:
    """At Z-Image's sizes for 1024x1024, by the tracker: one slice's scores and the result."""
    tokens, heads, channels = 4352, 30, 128
    peaks = {}
    for mode, size in (("whole", 0), ("heads", 15), ("heads", 6), ("max", 0)):
        options = {} if mode == "whole" else models.options(models.sliced(model, mode, size))
        with FakeTensorMode():
            q, k, v = (
                torch.empty(1, heads, tokens, channels, dtype=torch.bfloat16) for _ in range(3)
            )
            with PeakTracker() as tracker:
                models.function(name)(
                    q, k, v, heads, skip_reshape=True, transformer_options=options
                )
        peaks[size or mode] = tracker.peak_bytes
    result = heads * tokens * channels * 2
    assert peaks["whole"] >= 2 * heads * 4096 * tokens * 2
    for share, key in ((2, 15), (5, 6), (30, "max")):
        assert peaks[key] <= peaks["whole"] / share + 2 * result
