"""Which layers a file marks as quantised; what the host makes of the marks is in tests/host."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pack.nodes.weights.component import Component
from pack.nodes.weights.family import z_image
from pack.nodes.weights.header import WeightsError
from pack.nodes.weights.quantised import joined_metadata, quantised_layers
from pack.testing.fake_files import component, z_image_shapes

LAYER = "layers.0.feed_forward.w1"


def listing(*texts: str, tensors: tuple[str, ...] = ()) -> Component:
    """A component of one file for each text, which is its list of quantised layers."""
    plain = component(dict.fromkeys(tensors, (1,)), label="x.safetensors")
    return dataclasses.replace(
        plain, metadata=tuple({"_quantization_metadata": t, "format": "pt"} for t in texts)
    )


def listed(*layers: str) -> str:
    return json.dumps({"layers": {name: {"format": "float8_e4m3fn"} for name in layers}})


@pytest.mark.parametrize("in_list", ["", "model.diffusion_model."])
def test_a_list_may_lack_the_prefix_that_the_host_takes_away(in_list):
    prefix = "model.diffusion_model."
    names = [*z_image_shapes(), f"{LAYER}.weight_scale"]
    shapes = {f"{prefix}{n}": z_image_shapes().get(n, (1,)) for n in names}
    metadata = ({"_quantization_metadata": listed(f"{in_list}{LAYER}")},)
    found = dataclasses.replace(component(shapes), metadata=metadata)
    assert z_image(found).layers == 2
    with pytest.raises(WeightsError, match=f"holds the scale {prefix}{LAYER}.weight_scale, and"):
        z_image(dataclasses.replace(found, metadata=()))


def test_the_lists_of_all_files_are_joined():
    found = listing(listed("a"), listed("b", "c"))
    assert quantised_layers(found) == {"a", "b", "c"}
    joined = joined_metadata(found)
    assert joined == {"format": "pt", "_quantization_metadata": listed("a", "b", "c")}


def test_without_marks():
    found = listing(tensors=("a.weight", "a.bias"))
    assert quantised_layers(found) == set()
    assert joined_metadata(found) == {}


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"layers": 3}', '{"layers": ["ab", 7]}'])
def test_a_malformed_list(text):
    with pytest.raises(WeightsError) as caught:
        quantised_layers(listing(text))
    assert str(caught.value) == (
        "x.safetensors has a malformed _quantization_metadata: download it again"
    )
