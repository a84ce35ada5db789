"""The formulas of nodes/denoiser/families.py against the host's classes at full width."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pack.nodes.denoiser.families import (
    FAMILIES,
    FamilyRequest,
    family_peak_bytes,
    family_stock_bytes,
)
from pack.nodes.denoiser.plan import DenoiserChoice
from pack.nodes.denoiser.unet_peak import (
    UNETS,
    UNetRequest,
    unet_peak_bytes,
    unet_stock_bytes,
)
from pack.nodes.prefer import Prefer
from pack.testing import families as measured

pytestmark = pytest.mark.usefixtures("host")


def request_of(name: str, call: measured.Call) -> FamilyRequest:
    return FamilyRequest(
        FAMILIES[name],
        call.width_px,
        call.height_px,
        frames=call.frames,
        references=call.references,
        batch=call.batch,
        text_tokens=call.text_tokens,
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sizes_are_those_of_the_hosts_model(name: str) -> None:
    """As the node reads them, of as few blocks as testing/families.py builds."""
    from comfy.model_patcher import ModelPatcher
    from pack.nodes.host.denoiser.patch import transformer_sizes

    published = FAMILIES[name]
    family = measured.FAMILIES[published.name]
    meta = torch.device("meta")
    model = measured.build(family, dtype=torch.bfloat16, device=meta)
    found = transformer_sizes(ModelPatcher(model, load_device=meta, offload_device=meta))
    assert dataclasses.replace(published.sizes, layers=found.layers) == found
    assert (published.cell_px, published.latent_px) == (family.cell, family.latent_px)
    assert (found.channels, found.cap_dim) == (family.channels, family.text)
    assert published.frames == family.frames and published.joins_text == family.joins_text
    call = measured.CALLS[published.name][0]
    assert request_of(name, call).stream_bytes == measured.stream_bytes(family, call)


@pytest.mark.parametrize("way", [
    None, "speed", "balance",
    pytest.param("smallest", marks=[pytest.mark.once, pytest.mark.slow]),
])  # fmt: skip
@pytest.mark.parametrize(("name", "number"), [(n, i) for n in FAMILIES for i in range(2)])
def test_the_formula_is_right_to_three_in_a_hundred(
    name: str, number: int, way: Prefer | None
) -> None:
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    if way == "smallest" and number:
        pytest.skip("minutes on fake tensors; the first size has the same cuts")

    def patched(patcher: Any) -> Any:
        if way is None:
            return patcher
        return ApplyGradientCheckpoint.execute(patcher, prefer=way).args[0]

    published = FAMILIES[name]
    call = measured.CALLS[published.name][number]
    request = request_of(name, call)
    if way is None:
        predicted = family_stock_bytes(request)
    else:
        predicted = family_peak_bytes(request, request.plan(DenoiserChoice(way)))
    tracker = measured.measure(measured.FAMILIES[published.name], call, patched=patched)
    assert predicted == pytest.approx(tracker.peak_bytes, rel=0.03)


@pytest.mark.parametrize("way", [
    None, "speed", "balance",
    pytest.param("smallest", marks=[pytest.mark.once, pytest.mark.slow]),
])  # fmt: skip
@pytest.mark.parametrize(("name", "number"), [(n, i) for n in UNETS for i in range(2)])
def test_the_formula_of_the_u_nets(name: str, number: int, way: Prefer | None) -> None:
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    if way == "smallest" and (number or name == "sdxl"):
        pytest.skip("minutes on fake tensors; tests/host/denoiser/test_skips.py has SDXL's")

    def patched(patcher: Any) -> Any:
        if way is None:
            return patcher
        return ApplyGradientCheckpoint.execute(patcher, prefer=way).args[0]

    unet = UNETS[name]
    call = measured.CALLS[unet.name][number]
    family = measured.FAMILIES[unet.name]
    request = UNetRequest(unet, call.width_px, call.height_px, call.batch, call.text_tokens)
    assert request.stream_bytes == measured.stream_bytes(family, call)
    if way is None:
        predicted = unet_stock_bytes(request)
    else:
        predicted = unet_peak_bytes(request, DenoiserChoice(way))
    where = {"on": "cuda"} if measured.fake_device().type == "cuda" else {}
    tracker = measured.measure(family, call, patched=patched, **where)
    assert predicted == pytest.approx(tracker.peak_bytes, rel=0.03)
