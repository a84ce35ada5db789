"""Weights that are streamed from RAM stay what they are while several are held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("host")


class Stream:
    """Stands in for a copy stream of a card: copies are done when they are asked for."""

    def wait_stream(self, other: Any) -> None:
        pass

    def as_context(self, stream: Any = None) -> Any:
        return contextlib.nullcontext()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


class Elsewhere(torch.Tensor):
    """A weight in RAM, for a host whose other memory is RAM too."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda:0")


@pytest.fixture
def streams(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The host copies through two streams with a buffer each, as on a card without cudaMalloc."""
    management = host.model_management
    from comfy.cli_args import args

    device = torch.device("cpu")
    monkeypatch.setattr(args, "cuda_malloc", False)
    monkeypatch.setattr(management, "NUM_STREAMS", 2)
    monkeypatch.setitem(management.STREAMS, device, [Stream(), Stream()])
    monkeypatch.setattr(management, "sync_stream", lambda device, stream: None)
    monkeypatch.setattr(management, "current_stream", lambda device: None)
    yield management
    management.STREAM_CAST_BUFFERS.clear()
    management.stream_counters.pop(device, None)


def linear(value: float, *, bias: float | None = None, dtype: torch.dtype = torch.float32) -> Any:
    import comfy.ops

    layer = comfy.ops.disable_weight_init.Linear(64, 64, bias=bias is not None)
    del layer._parameters["weight"]
    layer.weight = torch.full((64, 64), value, dtype=dtype).as_subclass(Elsewhere)
    if bias is not None:
        del layer._parameters["bias"]
        layer.bias = torch.full((64,), bias).as_subclass(Elsewhere)
    layer.comfy_cast_weights = True
    return layer


@torch.inference_mode()
def test_the_hosts_own_buffers_are_written_over(streams):
    """Else the test below proves nothing."""
    import comfy.ops

    layers, like = [linear(float(n)) for n in (1, 2, 3)], torch.zeros(1, 64)
    held = [comfy.ops.cast_bias_weight(layer, like, offloadable=True)[0] for layer in layers]
    assert [float(weight[0, 0]) for weight in held] == [3.0, 2.0, 3.0]


@torch.inference_mode()
def test_three_streamed_weights_are_held_at_once(streams):
    from pack.nodes.host.base import fetch

    layers, like = [linear(float(n)) for n in (1, 2, 3)], torch.zeros(1, 64)
    with ExitStack() as until:
        held = [fetch.fetch_weights(layer, like, until) for layer in layers]
        assert [float(weight[0, 0]) for weight, _ in held] == [1.0, 2.0, 3.0]
        rows = torch.ones(2, 64)
        assert [float(functional.linear(rows, *one)[0, 0]) for one in held] == [
            64.0,
            128.0,
            192.0,
        ]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_three_streamed_biases_are_held_at_once(streams, dtype):
    """The bias lies in the same buffer as the weight, also where the weight alone is cast."""
    from pack.nodes.host.base import fetch

    layers = [linear(float(n), bias=10.0 * n, dtype=dtype) for n in (1, 2, 3)]
    with ExitStack() as until:
        held = [fetch.fetch_weights(layer, torch.zeros(1, 64), until) for layer in layers]
        assert [float(bias[0]) for _, bias in held] == [10.0, 20.0, 30.0]
        rows = torch.ones(2, 64)
        assert [float(functional.linear(rows, *one)[0, 0]) for one in held] == [
            74.0,
            148.0,
            222.0,
        ]


@torch.inference_mode()
def test_each_copy_is_its_own_with_cuda_malloc(streams, monkeypatch):
    """With cudaMallocAsync, NVIDIA's default, the host allocates each copy."""
    from comfy.cli_args import args
    from pack.nodes.host.base import fetch

    monkeypatch.setattr(args, "cuda_malloc", True)
    layers, like = [linear(float(n)) for n in (1, 2, 3)], torch.zeros(1, 64)
    with ExitStack() as until:
        held = [fetch.fetch_weights(layer, like, until) for layer in layers]
        assert [float(weight[0, 0]) for weight, _ in held] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("has_page", [False, True])
def test_only_a_weight_in_the_buffer_of_dynamic_vram_is_copied_out_of_it(host, has_bias, has_page):
    """One that was cast is elsewhere already: a second copy would double the largest weight."""
    import comfy.ops
    from pack.nodes.host.base.fetch import _is_in_shared_buffer

    layer: Any = comfy.ops.manual_cast.Linear(8, 8, bias=has_bias, dtype=torch.float8_e4m3fn)
    layer._v = ()
    # As resolve_cast_module_with_vbar of the host gives them, with a page or without.
    stream = (Stream(), torch.device("cuda") if has_page else None, None)
    as_stored = torch.empty(8, 8, dtype=torch.float8_e4m3fn)
    bias = torch.empty(8) if has_bias else None
    assert _is_in_shared_buffer(layer, as_stored, bias, stream) != has_page
    # The bias may be in the buffer still.
    is_shared = has_bias and not has_page
    assert _is_in_shared_buffer(layer, as_stored.to(torch.bfloat16), bias, stream) == is_shared


@torch.inference_mode()
def test_what_was_streamed_is_freed_once_it_is_converted(host: Any) -> None:
    """Names the bug: the fp8 form of each weight lived as long as its copy, half as much again."""
    import comfy.ops
    from pack.nodes.host.base.fetch import fetch_weights

    with FakeTensorMode(), ExitStack() as until:
        layer = comfy.ops.manual_cast.Linear(64, 32, dtype=torch.float8_e4m3fn, device="cpu")
        like = torch.empty(1, 64, dtype=torch.bfloat16, device="cuda")
        with Tracker() as tracker:
            weight, bias = fetch_weights(layer, like, until)
            assert bias is not None and (weight.dtype, bias.dtype) == (like.dtype, like.dtype)
            assert tracker.current_bytes == weight.nbytes + bias.nbytes


@torch.inference_mode()
def test_what_was_streamed_is_freed_once_a_lora_has_changed_it(host: Any) -> None:
    """Names the bug: beside a bias, which no LoRA changes, both forms of the weight stayed."""
    import comfy.ops
    from pack.nodes.host.base.fetch import fetch_weights

    with FakeTensorMode(), ExitStack() as until:
        layer = comfy.ops.manual_cast.Linear(64, 32, dtype=torch.bfloat16, device="cpu")
        layer.weight_function = [lambda weight: weight + 1]
        like = torch.empty(1, 64, dtype=torch.bfloat16, device="cuda")
        with Tracker() as tracker:
            weight, bias = fetch_weights(layer, like, until)
            assert bias is not None
            assert tracker.current_bytes == weight.nbytes + bias.nbytes


@torch.inference_mode()
def test_a_weight_is_returned_where_it_cannot_be_dequantised(
    host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names the bug: out of memory there, a page of dynamic VRAM stayed pinned."""
    import comfy.ops
    from comfy.quant_ops import QuantizedTensor
    from pack.nodes.host.base.fetch import fetch_weights

    def fail(weight: Any) -> Any:
        raise torch.OutOfMemoryError

    layer = comfy.ops.mixed_precision_ops().Linear(64, 64, bias=False)
    values, layout = torch.randn(64, 64), "TensorCoreFP8Layout"
    quantised = QuantizedTensor.from_float(values, layout, scale="recalculate")
    layer.weight = torch.nn.Parameter(quantised, requires_grad=False)
    returned: list[Any] = []
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda layer, *_: returned.append(layer))
    monkeypatch.setattr(QuantizedTensor, "dequantize", fail)
    # As from dynamic VRAM's page, which comes as it is stored.
    cast = (layer.weight, None, (None, torch.device("cuda"), None))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", lambda *_, **__: cast)
    with ExitStack() as until, pytest.raises(torch.OutOfMemoryError):
        fetch_weights(layer, torch.empty(1, 64), until)
    assert returned == [layer]


@torch.inference_mode()
def test_a_fetch_ends_a_cancelled_prompt(host: Any) -> None:
    """As each call of a layer does; a loop over chunks calls none."""
    from pack.nodes.host.base.fetch import fetch_weights

    management = host.model_management
    management.interrupt_current_processing(True)
    try:
        with ExitStack() as until, pytest.raises(management.InterruptProcessingException):
            fetch_weights(linear(1.0), torch.empty(1, 64), until)
    finally:
        management.interrupt_current_processing(False)
