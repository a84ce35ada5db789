"""The host plans with our figure: for one call, above the measured peak, below its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.nodes.prefer import PREFERENCES
from pack.testing import lean_models
from pack.testing.lean_models import latent, lean, prepare, prompt
from pack.testing.tracker import Tracker

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def z_image(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).model


def watched(model: Any, seen: list[Any], *, then: Callable[[], None] = lambda: None) -> Any:
    """A clone that notes what the host would plan with, behind our wrapper."""
    from comfy.patcher_extension import WrappersMP

    clone = model.clone()

    def noted(executor: Any, patcher: Any, shape: Any, *args: Any, **kwargs: Any) -> Any:
        wish, least = ([shape[0] * n, *shape[1:]] for n in (2, 1))
        seen.append((patcher.model.memory_required(wish), patcher.model.memory_required(least)))
        then()
        return executor(patcher, shape, *args, **kwargs)

    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", noted)
    return clone


@pytest.mark.parametrize("side", [32, 128, 256, 512])
def test_lower_than_the_hosts_for_the_call_only(z_image, side):
    noise = torch.empty(1, 16, side, side, device="meta")
    factor = z_image.model.memory_usage_factor
    stock: list[Any] = []
    ours: list[Any] = []
    prepare(watched(z_image, stock), noise)
    prepare(watched(lean(z_image), ours), noise)
    assert z_image.model.memory_usage_factor == factor
    assert all(0 < mine <= host for mine, host in zip(ours[0], stock[0], strict=True))
    # A batch of two is planned in proportion.
    assert ours[0][0] == pytest.approx(2 * ours[0][1])


def test_frames_are_left_to_the_hosts_estimate(z_image):
    """Of Ming-Image's latents: our figure is for one picture."""
    noise = torch.empty(1, 16, 3, 64, 64, device="meta")
    stock: list[Any] = []
    ours: list[Any] = []
    prepare(watched(z_image, stock), noise)
    prepare(watched(lean(z_image), ours), noise)
    assert ours == stock


def test_undone_after_an_exception(z_image):
    def fail() -> None:
        raise RuntimeError("while planning")

    factor, seen = z_image.model.memory_usage_factor, []
    with pytest.raises(RuntimeError, match="while planning"):
        prepare(watched(lean(z_image), seen, then=fail), latent())
    assert z_image.model.memory_usage_factor == factor
    assert seen[0][1] <= z_image.model.memory_required([1, 16, 48, 48])


def test_the_hosts_estimate_is_never_raised(z_image):
    """The host would send weights to RAM that its own estimate leaves on the card."""
    from pack.nodes.host.base.reserve import reserved

    factor = z_image.model.memory_usage_factor
    with reserved(z_image, 100.0, 101):
        assert z_image.model.memory_usage_factor == factor
    with reserved(z_image, 100.0, 50):
        assert z_image.model.memory_usage_factor == pytest.approx(factor / 2)
    assert z_image.model.memory_usage_factor == factor


def test_a_choice_of_blocks_keeps_the_hosts_own_figure(z_image):
    stock: list[Any] = []
    ours: list[Any] = []
    prepare(watched(z_image, stock), latent())
    prepare(watched(lean(z_image, blocks="refiners only"), ours), latent())
    assert ours == stock


@pytest.mark.parametrize("double_block", [False, True])
@pytest.mark.parametrize(("side", "batch"), [(32, 1), (64, 1), (48, 3)])
def test_never_below_the_measured_peak(host, z_image, side, batch, double_block):
    """Also where a patch sends the request to the host's own forward over our blocks.

    Measured without the attention's workspace, as in the plan.
    """
    import comfy.model_patcher
    import comfy.sampler_helpers

    ours = lean(z_image)
    if double_block:
        ours.set_model_double_block_patch(lambda args: {})
    seen: list[Any] = []
    noise = latent(side, batch=batch)
    prepare(watched(ours, seen), noise)
    options = comfy.model_patcher.create_model_options_clone(ours.model_options)
    comfy.sampler_helpers.prepare_model_patcher(ours, {}, options)
    host.model_management.load_models_gpu([ours])
    context = prompt(batch=batch)[0][0]
    transformer_options = {**options["transformer_options"], OVERRIDE: flash_like}
    with torch.inference_mode(), Tracker() as tracker:
        tracker.watch(noise, context)
        ours.model.apply_model(
            noise,
            torch.full((batch,), 0.5),
            c_crossattn=context,
            num_tokens=context.shape[1],
            transformer_options=transformer_options,
        )
    assert tracker.peak_bytes <= seen[0][1]


OVERRIDE = lean_models.OVERRIDE


def flash_like(function: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("prefer", PREFERENCES)
@pytest.mark.parametrize(
    ("width", "height", "batch"),
    [(512, 512, 4), (1024, 1024, 1), (1024, 1024, 4), (2048, 2048, 1), (4096, 4096, 1)],
)
def test_between_the_peak_and_the_hosts_figure_at_full_size(width, height, batch, prefer):
    """Formulas; that the peak's formula is the measured one is tested with the plan."""
    from pack.nodes.denoiser.need import denoiser_reserve_bytes
    from pack.nodes.denoiser.peak import lean_peak_bytes
    from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan

    request = Request(width, height, batch, 512, 2, Z_IMAGE)
    plan = denoiser_plan(request, DenoiserChoice(prefer))
    need = denoiser_reserve_bytes(request, plan)
    peak = lean_peak_bytes(request, plan, has_copies=True)
    # Source: memory_required in the host's comfy/model_base.py, factor 2.8.
    hosts = width * height // 64 * batch * 2 * 0.01 * 2.8 * 2**20
    assert peak < need < hosts
