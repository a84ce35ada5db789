"""Who computes an attention call, and what that holds: torch's own choice and the tracker judge."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.testing.attention_models import function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import cuda

pytestmark = pytest.mark.usefixtures("host")

WITH_SCORES = ["attention_basic", "attention_split", "attention_sub_quad"]


@pytest.fixture
def math_only():
    """torch has only its math kernel left."""
    enabled = cuda.flash_sdp_enabled()
    cuda.enable_flash_sdp(False)
    yield
    cuda.enable_flash_sdp(enabled)


def _call(name: str, *args: Any, **kwargs: Any) -> Any:
    from pack.nodes.host.attention.call import AttentionCall

    wrapped = function(name).__wrapped__
    return AttentionCall(wrapped, args, kwargs, previous=None, is_foreign=False)


# --- which kernel torch takes


def _masks(batch: int, heads: int, queries: int, keys: int) -> list[tuple[int, ...] | None]:
    whole = (batch, heads, queries, keys)
    return [
        None,
        whole[2:],
        (1, keys),
        (queries, 1),
        whole,
        (1, 1, queries, keys),
        (batch, 1, 1, keys),
        (queries - 1, keys),
        (batch, heads - 1, queries, keys),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2, 3, 1])
@pytest.mark.parametrize("value_channels", [16, 8])
def test_sdpa_choice_is_what_torch_chooses(
    dtype: torch.dtype, kv_heads: int, value_channels: int
) -> None:
    """torch's own answer is private: it judges here, and is asked nowhere else."""
    from pack.nodes.host.base.sdpa import sdpa_choice

    fused = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    compared = 0
    for shape, gqa in itertools.product(_masks(2, 4, 24, 12), (False, True)):
        q = torch.zeros(2, 4, 24, 16, dtype=dtype)
        k = torch.zeros(2, kv_heads, 12, 16, dtype=dtype)
        v = torch.zeros(2, kv_heads, 12, value_channels, dtype=dtype)
        mask = None if shape is None else torch.zeros(shape, dtype=dtype)
        try:
            choice = torch._fused_sdp_choice(q, k, v, mask, 0.0, False, enable_gqa=gqa)
            torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa)
        except RuntimeError:  # shapes that torch refuses
            continue
        compared += 1
        wanted = "fused" if choice == fused else "math"
        assert sdpa_choice(q, k, v, mask, enable_gqa=gqa) == wanted, (shape, gqa)
    assert compared or kv_heads == 3


def test_sdpa_choice_with_the_kernel_switched_off(math_only: None) -> None:
    from pack.nodes.host.base.sdpa import sdpa_choice

    q = torch.zeros(1, 2, 8, 16)
    assert sdpa_choice(q, q, q, None, enable_gqa=False) == "math"


def test_sdpa_choice_where_torch_does_not_tell() -> None:
    from pack.nodes.host.base.sdpa import sdpa_choice

    q = torch.zeros(1, 2, 8, 16, device="meta")
    assert sdpa_choice(q, q, q, None, enable_gqa=False) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_choice_on_a_gpu(dtype: torch.dtype) -> None:
    from pack.nodes.host.base.sdpa import sdpa_choice

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    q = torch.zeros(1, 2, 256, 128, dtype=dtype, device="cuda")
    choice = torch._fused_sdp_choice(q, q, q, None, 0.0, False)
    wanted = "math" if choice == torch.nn.attention.SDPBackend.MATH.value else "fused"
    assert sdpa_choice(q, q, q, None, enable_gqa=False) == wanted


# --- what the functions hold


@pytest.mark.parametrize("name", [*WITH_SCORES, "attention_pytorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, torch.float32])
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("mask_shape", [None, (1024, 512), (2, 1, 1024, 512)])
def test_buffers_are_a_close_upper_bound(
    math_only: None,
    name: str,
    dtype: torch.dtype,
    precision: Any,
    skip_reshape: bool,
    mask_shape: tuple[int, ...] | None,
) -> None:
    from pack.nodes.attention.budget import Geometry, workspace_bytes
    from pack.nodes.host.attention.backend import backend_of

    batch, heads, queries, keys, channels = 2, 4, 1024, 512, 64
    with FakeTensorMode():
        q, k, v = (torch.empty(batch, t, heads * channels, dtype=dtype)
                   for t in (queries, keys, keys))  # fmt: skip
        if skip_reshape:
            q, k, v = (t.unflatten(-1, (heads, channels)).transpose(1, 2) for t in (q, k, v))
        mask = None if mask_shape is None else torch.empty(mask_shape, dtype=dtype)
        options = {"attn_precision": precision, "skip_reshape": skip_reshape, "mask": mask}
        workspace = backend_of(_call(name, q, k, v, heads, **options)).workspace
        with PeakTracker() as tracker:
            out = function(name)(q, k, v, heads, **options)
    assert workspace is not None
    shape = Geometry(batch, heads, heads, queries, keys, channels)
    estimate = workspace_bytes(shape, workspace)
    assert tracker.peak_bytes <= estimate + out.nbytes
    assert estimate <= 1.3 * tracker.peak_bytes


@pytest.mark.parametrize("with_mask", [False, True])
def test_shared_keys_and_values_are_repeated_for_a_mask_alone(with_mask: bool) -> None:
    import comfy.ops
    from pack.nodes.host.attention.backend import backend_of

    if not hasattr(comfy.ops, "repeat_kv_for_gqa"):
        pytest.skip("this host's attention functions do not share keys and values")
    tokens, channels = 1024, 64
    with FakeTensorMode():
        q, k, v = (torch.empty(1, heads, tokens, channels) for heads in (8, 2, 2))
        mask = torch.empty(tokens, tokens) if with_mask else None
        options = {"enable_gqa": True, "mask": mask, "skip_reshape": True}
        options["skip_output_reshape"] = True
        workspace = backend_of(_call("attention_pytorch", q, k, v, 8, **options)).workspace
        with PeakTracker() as tracker:
            out = function("attention_pytorch")(q, k, v, 8, **options)
    assert workspace is not None
    sums = 8 * tokens * 4  # one of each row of scores, beside the result
    assert 8 * tokens * workspace.per_key == tracker.peak_bytes - out.nbytes - sums


def _fake_cuda_call(name: str, dtype: torch.dtype, **options: Any) -> Any:
    """A call whose tensors say that they lie on a card; nothing is computed with them."""
    with FakeTensorMode():
        q = torch.empty(1, 4, 2048, 64, dtype=dtype, device="cuda")
    return _call(name, q, q, q, 4, skip_reshape=True, **options)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("attention_flash", ("flash attention", (0, 0, 0, None))),
        ("attention_sage", ("sage attention", (0, 64, 256, None))),
        ("attention3_sage", ("sage attention 3", (0, 32, 64, None))),
        ("attention_xformers", ("xformers attention", (0, 0, 0, None))),
    ],
)
def test_flash_like_functions_hold_no_scores(name: str, wanted: Any) -> None:
    from pack.nodes.host.attention.backend import backend_of

    assert backend_of(_fake_cuda_call(name, torch.bfloat16)) == wanted


@pytest.mark.parametrize(
    ("dtype", "channels", "wanted"),
    [
        (torch.bfloat16, 128, (0, 129, 257, None)),
        (torch.float16, 96, (0, 449, 769, None)),  # padded to 128
        (torch.float32, 64, (0, 129, 129, None)),
    ],
)
def test_what_the_hosts_int8_attention_holds(
    host: Any, dtype: torch.dtype, channels: int, wanted: Any
) -> None:
    """As comfy_kitchen's sage_attention allocates: it runs on cards alone."""
    from pack.nodes.host.attention.backend import backend_of

    name = "attention_comfy_kitchen_int8"
    if not hasattr(sys.modules["comfy.ldm.modules.attention"], name):
        pytest.skip(f"ComfyUI {host.version} has no INT8 attention")
    with FakeTensorMode():
        q = torch.empty(1, 4, 2048, channels, dtype=dtype, device="cuda")
    known = "Comfy Kitchen's INT8 attention"
    for option in ({}, {"low_precision_attention": False}):  # which it does not read
        call = _call(name, q, q, q, 4, skip_reshape=True, **option)
        assert backend_of(call) == (known, wanted)


@pytest.mark.parametrize("name", ["attention_sage", "attention3_sage", "attention_flash"])
def test_they_run_on_cards_in_half_precision_alone(name: str) -> None:
    from pack.nodes.host.attention.backend import backend_of

    q = torch.zeros(1, 4, 2048, 64)
    wanted = ("PyTorch's fused attention", (0, 0, 0, None))
    assert backend_of(_call(name, q, q, q, 4, skip_reshape=True)) == wanted


@pytest.mark.parametrize("name", ["attention_sage", "attention3_sage", "attention_flash"])
def test_their_fallbacks_are_seen(math_only: None, name: str) -> None:
    from pack.nodes.host.attention.backend import backend_of

    q = torch.zeros(1, 4, 2048, 64)
    options = {"skip_reshape": True, "mask": torch.zeros(2048, 2048)}
    if name == "attention_sage":
        options["low_precision_attention"] = False
    assert backend_of(_call(name, q, q, q, 4, **options)).name == "PyTorch's math attention"
