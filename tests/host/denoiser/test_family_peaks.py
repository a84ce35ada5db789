"""The formulas of nodes/denoiser/families.py against the host's classes at full width."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
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


ONCE = pytest.mark.once
# At the first size, in streams: balance and smallest. ComfyUI has 17.5, 14.5, 10.7 and 8.5.
REACH = {
    "flux2": {"balance": 5.5, "smallest": 3.2},
    "flux1": {"balance": 5.0, "smallest": 3.0},
    "qwen-image": {"balance": 5.0, "smallest": 3.0},
    "wan": {"balance": 4.5, "smallest": 2.8},
}
# On both hosts; the others on the newest alone.
FIRST_KINDS = ("scaled fp8", measured.WEIGHT_DTYPE)
WAYS = pytest.mark.parametrize("way", [
    pytest.param(None, marks=ONCE), pytest.param("speed", marks=ONCE), "balance",
    pytest.param("smallest", marks=[ONCE, pytest.mark.slow]),
])  # fmt: skip


def cases(names: Iterable[str]) -> Any:
    """Each model at two sizes; the second on the newest host alone."""
    return [pytest.param(name, i, marks=ONCE if i else ()) for name in names for i in range(2)]


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
    from pack.nodes.host.denoiser.known import transformer_sizes

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


@WAYS
@pytest.mark.parametrize(("name", "number"), cases(FAMILIES))
def test_the_formula_is_right_to_three_in_a_hundred_and_the_peak_within_reach(
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
    family = measured.FAMILIES[published.name]
    few = ("depth", "depth_single_blocks", "num_layers") if way == "smallest" else ()
    changed = {key: 1 for key in few if key in family.config}  # else it takes minutes
    tracker = measured.measure(family, call, changed=changed, patched=patched)
    assert predicted == pytest.approx(tracker.peak_bytes, rel=0.03)
    if number == 0 and way in REACH[name]:
        assert tracker.peak_bytes <= REACH[name][way] * request.stream_bytes


FEWER_BITS = [
    pytest.param(name, kind, 0, marks=() if kind in FIRST_KINDS else ONCE)
    for name in ("flux2", "flux1", "qwen-image", "wan")
    for kind in measured.KINDS
] + [pytest.param(name, kind, 1, marks=ONCE) for name in ("flux2",) for kind in measured.KINDS]


@WAYS
@pytest.mark.parametrize(("name", "kind", "number"), FEWER_BITS)
def test_the_formula_of_weights_in_fewer_bits_which_never_cost_more_than_the_hosts(
    name: str, kind: str, number: int, way: Prefer | None
) -> None:
    """Names the bug: what the host's quantised layers gave was thrown away but for some columns."""
    import comfy.quant_ops
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint
    from pack.nodes.host.denoiser.known import transformer_sizes

    if measured.ON_CARD.get(kind, ("nvfp4",))[0] not in comfy.quant_ops.QUANT_ALGOS:
        pytest.skip(f"this host has no {kind}")
    if way == "smallest" and (number or (name == "wan" and kind != FIRST_KINDS[0])):
        pytest.skip("minutes on fake tensors; the first size has the same cuts")
    family = measured.FAMILIES[FAMILIES[name].name]
    few = ("depth", "depth_single_blocks", "num_layers") if way == "smallest" else ()
    changed = {key: 1 for key in few if key in family.config}
    fake = measured.FakeFamily(family, weights=kind, changed=changed)
    patcher = fake.patcher()
    published = dataclasses.replace(FAMILIES[name], sizes=transformer_sizes(patcher))
    call = measured.CALLS[published.name][number]
    request = dataclasses.replace(request_of(name, call), family=published)
    predicted = of_host = family_stock_bytes(request)
    if way is not None:
        patcher = ApplyGradientCheckpoint.execute(patcher, prefer=way).args[0]
        predicted = family_peak_bytes(request, request.plan(DenoiserChoice(way)))
    peak = fake.measure(call, patcher=patcher).peak_bytes
    assert predicted == pytest.approx(peak, rel=0.03)
    assert way is None or peak < of_host
    if kind in measured.ON_CARD and number == 0 and way == "balance":
        assert peak <= 6.1 * request.stream_bytes


@WAYS
@pytest.mark.parametrize(("name", "number"), cases(UNETS))
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


@pytest.mark.parametrize("name", UNETS)
def test_the_node_predicts_the_u_nets_that_were_measured(name: str) -> None:
    """Not others, nor settings or devices of which nothing is known."""
    from comfy.model_patcher import ModelPatcher
    from pack.nodes.host.denoiser.known import published_unet, transformer_sizes

    unet, meta = UNETS[name], torch.device("meta")
    family = measured.FAMILIES[unet.name]
    for changed, wanted in (({}, unet), ({"in_channels": 9}, None)):
        model = measured.build(family, dtype=torch.bfloat16, device=meta, **changed)
        patcher = ModelPatcher(model, load_device=meta, offload_device=meta)
        sizes = transformer_sizes(patcher)
        assert published_unet(patcher, sizes, DenoiserChoice()) == wanted
        for choice in (DenoiserChoice("smallest"), DenoiserChoice(chunk_tokens=256)):
            assert published_unet(patcher, sizes, choice) is None
        patcher.load_device = torch.device("cuda:0")
        assert published_unet(patcher, sizes, DenoiserChoice("smallest")) == wanted
