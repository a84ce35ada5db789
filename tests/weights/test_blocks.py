"""Whether a stack of equal blocks is complete."""

from __future__ import annotations

import pytest
from pack.nodes.weights.blocks import count_blocks, extent
from pack.nodes.weights.header import TensorInfo, WeightsError


def tensors(*names: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", (2, 3), 24, 0) for name in names}


def stack(count: int, prefix: str = "layers.") -> list[str]:
    return [f"{prefix}{n}.{t}" for n in range(count) for t in ("a.weight", "a.bias", "b.weight")]


@pytest.mark.parametrize("count", [1, 2, 12])
def test_counts_complete_blocks(count):
    other = ["layers", "layers.x.a.weight", "norm.weight", "my.layers.99.a.weight"]
    assert count_blocks("M", tensors(*stack(count), *other), "layers.") == count


def test_counts_below_a_prefix():
    names = [*stack(3, "model.layers."), *stack(1, "layers.")]
    assert count_blocks("M", tensors(*names), "model.layers.") == 3


def test_what_is_no_weight_or_bias_is_no_block():
    """Quantised files hold scales and the like in some blocks only."""
    names = [*stack(2), "layers.0.a.scale_weight", "layers.7.note"]
    assert count_blocks("M", tensors(*names), "layers.") == 2


def test_no_block():
    with pytest.raises(WeightsError, match=r"^M lacks layers\.0: download it again$"):
        count_blocks("M", tensors("norm.weight"), "layers.")


@pytest.mark.parametrize("gone", [0, 1, 4])
def test_a_gap_in_the_numbers(gone):
    names = [n for n in stack(6) if not n.startswith(f"layers.{gone}.")]
    with pytest.raises(WeightsError, match=rf"^M lacks layers\.{gone}: download it again$"):
        count_blocks("M", tensors(*names), "layers.")


@pytest.mark.parametrize("gone", [n for n in stack(3) if "bias" in n or "b." in n])
def test_a_tensor_missing_in_one_block(gone):
    names = [n for n in stack(3) if n != gone]
    with pytest.raises(WeightsError) as caught:
        count_blocks("M", tensors(*names), "layers.")
    assert str(caught.value) == f"M lacks the tensor {gone}: download it again"


def test_a_number_far_off_takes_no_time():
    names = [*stack(1), "layers.999999.a.weight"]
    with pytest.raises(WeightsError, match=r"^M lacks the tensor layers\.|^M lacks layers\.1:"):
        count_blocks("M", tensors(*names), "layers.")


def test_extent():
    found = tensors("a")
    assert (extent("M", found, "a"), extent("M", found, "a", 1)) == (2, 3)


@pytest.mark.parametrize(("name", "axis"), [("b", 0), ("a", 2)])
def test_extent_of_what_is_not_there(name, axis):
    with pytest.raises(WeightsError) as caught:
        extent("M", tensors("a"), name, axis)
    assert str(caught.value) == f"M lacks the tensor {name}: download it again"
