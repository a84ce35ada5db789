"""Of other families too, the host plans with less: the share of its own estimate that we hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from pack.nodes.prefer import PREFERENCES, Prefer
from pack.nodes.units import MIB
from pack.testing import families as measured

pytestmark = pytest.mark.usefixtures("host")
META = torch.device("meta")


@pytest.fixture(scope="module", params=FAMILIES)
def named(request: Any) -> Iterator[tuple[str, Any]]:
    """A family's name, and a model of true width."""
    from comfy.model_patcher import ModelPatcher

    family = measured.FAMILIES[FAMILIES[request.param].name]
    model = measured.build(family, dtype=torch.bfloat16, device=META)
    yield request.param, ModelPatcher(model, load_device=META, offload_device=META)


def lean(patcher: Any, prefer: Prefer = "balance", **options: Any) -> Any:
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    return ApplyGradientCheckpoint.execute(patcher, prefer=prefer, **options).args[0]


def planned(
    patcher: Any, shape: tuple[int, ...], *, then: Callable[[], None] = lambda: None
) -> float:
    """The bytes that the host would plan with for one call."""
    from comfy.patcher_extension import WrapperExecutor, WrappersMP

    def plan(model: Any, shape: Any, conds: Any, model_options: Any = None) -> float:
        then()
        return model.model.memory_required(list(shape))

    wrappers = patcher.get_all_wrappers(WrappersMP.PREPARE_SAMPLING)
    executor = WrapperExecutor.new_executor(plan, wrappers)
    return executor.execute(patcher, shape, {}, model_options=patcher.model_options)


def shapes(name: str) -> Iterator[tuple[int, ...]]:
    family = FAMILIES[name]
    for width, height in ((512, 512), (1024, 1024), (2560, 1440)):
        sides = (height // family.latent_px, width // family.latent_px)
        frames = {0: (), 1: (1,), 4: (21,)}[family.frames]
        yield (1, family.sizes.channels, *frames, *sides)


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_the_share_that_our_blocks_hold_and_the_weights_of_one(named, prefer):
    name, patcher = named
    factor = patcher.model.memory_usage_factor
    ours = lean(patcher, prefer)
    for shape in shapes(name):
        request = FamilyRequest.of_latent(FAMILIES[name], shape, 2)
        assert request is not None
        lean_bytes = family_peak_bytes(request, request.plan(DenoiserChoice(prefer)))
        share = lean_bytes / family_stock_bytes(request)
        host, reserved = planned(patcher, shape), planned(ours, shape)
        expected = min(host, share * host + 2 * largest_block(patcher.model))
        assert reserved == pytest.approx(expected)
    assert patcher.model.memory_usage_factor == factor


def test_the_hosts_estimate_leaves_room_for_kernels(named):
    """With fused attention, where it is lowest: on a CPU it is more than seven times that."""
    name, patcher = named
    for shape in shapes(name):
        request = FamilyRequest.of_latent(FAMILIES[name], shape, 2)
        assert request is not None
        fused = 2 * 0.01 * math.prod(shape[2:]) * patcher.model.memory_usage_factor * MIB
        assert fused > 1.7 * family_stock_bytes(request)


def test_the_hosts_own_where_its_blocks_run(named):
    name, patcher = named
    *_, shape = shapes(name)
    host = planned(patcher, shape)
    assert planned(lean(patcher), shape) < host
    assert planned(lean(patcher, blocks="every second"), shape) == host
    patched = patcher.clone()
    patched.set_model_attn1_output_patch(lambda out, options: out)
    assert planned(lean(patched), shape) == host
    odd = (*shape[:2], shape[-1])  # no picture
    assert planned(lean(patcher), odd) == planned(patcher, odd)


def test_undone_after_an_exception(named):
    def fail() -> None:
        raise RuntimeError("while planning")

    name, patcher = named
    factor = patcher.model.memory_usage_factor
    with pytest.raises(RuntimeError, match="while planning"):
        planned(lean(patcher), next(shapes(name)), then=fail)
    assert patcher.model.memory_usage_factor == factor


def test_layers_of_a_picture_keep_the_hosts_own(named):
    """Qwen-Image-Layered draws several pictures at once, as frames."""
    name, patcher = named
    family = FAMILIES[name]
    shape = (1, family.sizes.channels, 3, 64, 64)
    is_left = family.frames < 2
    host, ours = planned(patcher, shape), planned(lean(patcher), shape)
    assert (ours == host) == is_left


def largest_block(model: Any) -> int:
    """Weights of the block with the most."""
    lists = [m for m in model.diffusion_model.children() if isinstance(m, torch.nn.ModuleList)]
    return max(sum(p.numel() for p in block.parameters()) for blocks in lists for block in blocks)
