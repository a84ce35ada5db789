"""The host's attention functions, sliced: every layout, mask and dtype gives the same result."""

from __future__ import annotations

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


def _check(name: str, model: Any, mode: str, size: int, args: Any, options: Any) -> int:
    """Compares a sliced call with the plain one; returns into how many calls it was cut."""
    whole = models.function(name)(*args, HEADS, **options)
    recorder = models.Recorder()
    sliced = models.sliced(models.with_override(model, recorder), mode, size)
    before = [t.clone() for t in args]
    got = models.function(name)(*args, HEADS, **options, transformer_options=models.options(sliced))
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))
    assert got.shape == whole.shape and got.dtype == whole.dtype
    if mode == "queries":  # blocks of another size in the CPU's kernels
        rounding = 8 * torch.finfo(whole.dtype).eps
        torch.testing.assert_close(got, whole, rtol=rounding, atol=rounding)
    else:
        assert torch.equal(got, whole)
    assert {function for function, _, _ in recorder.seen} == {name}
    return len(recorder.seen)


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
@pytest.mark.parametrize(("mode", "size"), SETTINGS)
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_masks_layouts_and_cross_attention(
    model: Any,
    shape: tuple[int, ...] | None,
    name: str,
    mode: str,
    size: int,
    skip_reshape: bool,
    skip_output_reshape: bool,
) -> None:
    options: dict[str, Any] = {"mask": None if shape is None else models.draw(*shape, seed=3)}
    options.update(skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    args = models.inputs(skip_reshape=skip_reshape)
    calls = _check(name, model, mode, size, args, options)
    assert (
        calls == {("max", 0): 6, ("heads", 4): 2, ("queries", 64): 3, ("queries", 0): 2}[mode, size]
    )


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("mode", "size"), SETTINGS)
@pytest.mark.parametrize("precision", [None, torch.float32])
def test_half_precision(model: Any, name: str, mode: str, size: int, precision: Any) -> None:
    args = models.inputs(skip_reshape=True, dtype=torch.bfloat16)
    options = {"skip_reshape": True, "attn_precision": precision}
    assert _check(name, model, mode, size, args, options) > 1


@pytest.mark.parametrize("shape", [(QUERIES, KEYS), (BATCH, 1, 1, KEYS)])
@pytest.mark.parametrize(("mode", "size"), SETTINGS)
def test_bool_masks(model: Any, mode: str, size: int, shape: tuple[int, ...]) -> None:
    mask = models.draw(*shape, seed=3) > -0.5
    args = models.inputs(skip_reshape=True)
    options = {"skip_reshape": True, "mask": mask}
    assert _check("attention_pytorch", model, mode, size, args, options) > 1


@pytest.mark.parametrize("shape", [(BATCH, KEYS), (BATCH, 1, 1, KEYS)])
@pytest.mark.parametrize(("mode", "size"), SETTINGS)
def test_bool_masks_of_attention_basic_are_by_sample_and_key(
    model: Any, mode: str, size: int, shape: tuple[int, ...]
) -> None:
    mask = models.draw(*shape, seed=3) > -0.5
    options = {"skip_reshape": True, "mask": mask}
    args = models.inputs(skip_reshape=True)
    assert _check("attention_basic", model, mode, size, args, options) > 1


@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("mode", "size"), SETTINGS)
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_shared_keys_and_values(
    model: Any,
    kv_heads: int,
    name: str,
    mode: str,
    size: int,
    skip_reshape: bool,
    with_mask: bool,
) -> None:
    import comfy.ops

    if not hasattr(comfy.ops, "repeat_kv_for_gqa"):
        pytest.skip("this host's attention functions do not share keys and values")
    args = models.inputs(skip_reshape=skip_reshape, kv_heads=kv_heads)
    mask = models.draw(BATCH, HEADS, QUERIES, KEYS, seed=3) if with_mask else None
    options = {"enable_gqa": True, "skip_reshape": skip_reshape, "mask": mask}
    assert _check(name, model, mode, size, args, options) > 1


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
