"""Some columns of the host's quantised layers are those that the whole layer gives."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from pack.testing.stock_forward import quantise
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode

pytestmark = [pytest.mark.usefixtures("host", "_one_thread")]
FORMATS = ["float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise"]
IN, OUT, ROWS = 256, 640, 333
# Whole, at borders of blocks of scales, across them, and the last ones.
SPANS = [(0, None), (0, 640), (128, 384), (100, 300), (600, None), (130, 258)]
DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(
    algorithm: str,
    dtype: torch.dtype,
    *,
    multiplies: bool,
    features: int = OUT,
    **options: Any,
) -> Any:
    """A layer as the host loads it, with a bias."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if algorithm not in QUANT_ALGOS:
        pytest.skip(f"this host has no {algorithm}")
    logging.getLogger("comfy_kitchen").setLevel(logging.ERROR)  # it tells each fallback
    layer: Any = comfy.ops.mixed_precision_ops({}, dtype).Linear(IN, features, dtype=dtype)
    weight = draw(features, IN, seed=1, dtype=dtype)
    layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    packed = QuantizedTensor.from_float(weight, layout, scale="recalculate", **options)
    state = packed.state_dict("weight")
    mark = {"format": algorithm, **({"convrot": True} if options.get("convrot") else {})}
    state["comfy_quant"] = torch.tensor(list(json.dumps(mark).encode()), dtype=torch.uint8)
    state["bias"] = draw(features, seed=2, dtype=dtype)
    if algorithm == "nvfp4":
        state["input_scale"] = torch.tensor(0.01)
    layer.load_state_dict(state, strict=False)
    layer._full_precision_mm = not multiplies
    return layer


def assert_same_columns(layer: Any, dtype: torch.dtype, *, copy_elements: int = 0) -> None:
    from pack.nodes.denoiser.cuts import DenoiserPlan
    from pack.nodes.host.denoiser.projections import cut_projection

    rows = draw(ROWS, IN, seed=3, dtype=dtype)
    wanted = layer(rows.clone())
    plan = DenoiserPlan(1, 64, 64, copy_elements=copy_elements)
    with ExitStack() as until:
        cut = cut_projection(layer, rows, until, plan)
        assert not cut.is_whole
        for first, last in SPANS:
            assert torch.equal(cut(rows, first, last), wanted[:, first:last])
            end = layer.out_features if last is None else last
            into = torch.full((ROWS, end - first + 64), 7.0, dtype=dtype)
            cut.write(rows, [(first, end), (64, 128)], into)
            assert torch.equal(into[:, : end - first], wanted[:, first:end])
            assert torch.equal(into[:, end - first :], wanted[:, 64:128])


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("algorithm", FORMATS)
def test_columns_of_each_format(algorithm: str, multiplies: bool, dtype: torch.dtype) -> None:
    layer = layer_of(algorithm, dtype, multiplies=multiplies)
    for copy_elements in (0, 1):
        assert_same_columns(layer, dtype, copy_elements=copy_elements)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"convrot": True}], ids=str)
def test_columns_of_int8_with_a_scale_for_each(options: dict[str, Any], dtype: torch.dtype) -> None:
    layer = layer_of("int8_tensorwise", dtype, multiplies=True, per_channel=True, **options)
    assert layer.weight.params.scale.numel() == OUT
    assert layer.weight.params.convrot == bool(options)
    assert_same_columns(layer, dtype)


@torch.inference_mode()
@pytest.mark.parametrize("algorithm", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("multiplies", [True, False])
def test_features_that_are_filled_up(algorithm: str, multiplies: bool) -> None:
    layer = layer_of(algorithm, torch.bfloat16, multiplies=multiplies, features=OUT + 8)
    assert_same_columns(layer, torch.bfloat16, copy_elements=1)


@torch.inference_mode()
@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_a_plain_weight_in_fp8(is_fast: bool, dtype: torch.dtype) -> None:
    import comfy.ops

    kind = comfy.ops.fp8_ops if is_fast else comfy.ops.manual_cast
    layer: Any = kind.Linear(IN, OUT, dtype=torch.float8_e4m3fn)
    weight = draw(OUT, IN, seed=1, dtype=dtype).to(torch.float8_e4m3fn)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    bias = draw(OUT, seed=2, dtype=dtype).to(torch.float8_e4m3fn)
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    assert_same_columns(layer, dtype, copy_elements=1)


@torch.inference_mode()
@pytest.mark.parametrize("multiplies", [True, False])
@pytest.mark.parametrize("change", ["hook", "weight_function", "forward", "pre_quant_scale"])
def test_a_layer_that_another_node_changed_is_not_cut(change: str, multiplies: bool) -> None:
    from pack.nodes.host.denoiser.stored import makes_columns, multiplies_columns

    layer = layer_of("float8_e4m3fn", torch.float32, multiplies=multiplies)
    assert (multiplies_columns(layer), makes_columns(layer)) == (multiplies, not multiplies)
    if change == "hook":
        layer.register_forward_hook(lambda module, given, result: 2 * result)
    elif change == "forward":
        layer.forward = lambda rows: rows
    elif change == "weight_function":
        layer.weight_function = [lambda weight: 2 * weight]
    else:  # the host's own forward smooths the rows
        layer.pre_quant_scale = torch.nn.Parameter(torch.rand(IN), requires_grad=False)
        assert multiplies_columns(layer) == multiplies and not makes_columns(layer)
        return
    assert not multiplies_columns(layer) and not makes_columns(layer)


@torch.inference_mode()
@pytest.mark.parametrize("multiplies", [True, False])
def test_what_columns_hold(multiplies: bool) -> None:
    """Rows in fp8 beside a product that is written; or a copy of the weight's rows."""
    import comfy.ops
    from pack.nodes.denoiser.cuts import DenoiserPlan
    from pack.nodes.host.denoiser.projections import cut_projection

    dtype, tokens, columns = torch.bfloat16, 512, 384
    with FakeTensorMode(), ExitStack() as until:
        layer = comfy.ops.mixed_precision_ops({}, dtype).Linear(IN, OUT, bias=False, device="cpu")
        model, name = torch.nn.ModuleList([layer]), "float8_e4m3fn"
        quantise(model, name, dtype, lambda path: True, multiplies=multiplies)
        rows = torch.empty(tokens, IN, dtype=dtype)
        into = torch.empty(tokens, columns, dtype=dtype)
        plan = DenoiserPlan(1, 64, 64, copy_elements=256 * IN)
        with Tracker() as tracker:
            cut_projection(layer, rows, until, plan).write(rows, [(0, columns)], into)
    held = tokens * IN + 2 * tokens * columns if multiplies else 2 * 256 * IN
    assert tracker.peak_bytes == pytest.approx(held, rel=0.01)
