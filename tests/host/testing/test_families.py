"""Other families' transformers on fake tensors: sizes that the host detects, and equal peaks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.units import MIB
from pack.testing.families import BLOCKS, CALLS, FAMILIES, build, measure, stream_bytes

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_host_detects_this_configuration(name: str) -> None:
    """In a file of such tensors; what it leaves to the class is the class's own default."""
    from comfy.model_detection import detect_unet_config

    family = FAMILIES[name]
    model = build(family, dtype=torch.bfloat16, device=torch.device("meta"))
    found: Any = detect_unet_config(model.diffusion_model.state_dict(), "")
    assert found is not None
    shared = family.config.keys() & found.keys()
    assert {key: found[key] for key in shared} == {key: family.config[key] for key in shared}
    assert len(shared) > 1


@pytest.mark.parametrize(
    ("name", "wanted"), [("FLUX.2 dev", 17), ("Qwen-Image", 11), ("SDXL", 31.5), ("SD1.5", 26)]
)
def test_a_peak_of_the_host_in_streams(name: str, wanted: float) -> None:
    """FLUX.2: linear1 has 9, silu and product 3 each. Qwen-Image: GELU has 4 + 4. The U-Nets: GEGLU
    has 8 + 4 + 4, the rest is the skip tensors, what they are joined with, and the streams."""
    call = CALLS[name][0]
    peak = measure(FAMILIES[name], call).peak_bytes
    assert peak / stream_bytes(FAMILIES[name], call) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("FLUX.2 dev", ("depth", "depth_single_blocks")),
        ("FLUX.1 dev", ("depth", "depth_single_blocks")),
        ("Qwen-Image", ("num_layers",)),
        ("Wan 2.1 14B", ("num_layers",)),
    ],
)
def test_more_blocks_peak_alike(name: str, counts: tuple[str, ...]) -> None:
    call = CALLS[name][0]
    few = measure(FAMILIES[name], call).peak_bytes
    more = measure(FAMILIES[name], call, changed=dict.fromkeys(counts, BLOCKS + 2)).peak_bytes
    assert abs(more - few) < MIB
