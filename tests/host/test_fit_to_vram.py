"""Fit to VRAM on the real host, on the CPU: what it plans, refuses and applies."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from . import lean_models
from .lean_models import latent, prepare, prompt, sample
from .vae_models import kl_vae

pytestmark = pytest.mark.usefixtures("host")
GIB = 2**30


@pytest.fixture(scope="module")
def loaded(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder)


def fit(model: Any, **options: Any) -> tuple[Any, Any, str]:
    from pack.nodes.fit_to_vram import FitToVRAM

    return FitToVRAM.execute(model, **options).args


def wire(side: int = 48, *, channels: int = 16, batch: int = 1) -> dict[str, torch.Tensor]:
    """What an empty latent node gives."""
    return {"samples": torch.zeros(batch, channels, side, side)}


def test_same_picture_and_the_model_is_left_as_it_was(loaded):
    patched, vae, report = fit(loaded.model, vae=loaded.vae, latent=wire(), conditioning=prompt())
    assert not loaded.model.object_patches and not loaded.model.wrappers
    assert torch.equal(sample(patched).latent, sample(loaded.model).latent)
    z = latent()
    with torch.inference_mode():
        assert torch.allclose(vae.decode(z), loaded.vae.decode(z), atol=1e-5)
    assert "384x384, batch 1, 7 text tokens, prefer balance" in report
    assert "nothing is enforced: the model runs without a GPU" in report
    assert "denoise" in report and "VAE decode" in report


def test_latent_and_prompt_go_before_the_widgets(loaded):
    _, _, report = fit(loaded.model, width=2048, height=2048, latent=wire(64, batch=3))
    assert report.startswith("512x512, batch 3, 512 text tokens")
    _, vae, report = fit(loaded.model, width=640, height=480, batch_size=2)
    assert report.startswith("640x480, batch 2") and vae is None


def test_refuses_a_latent_of_other_channels(loaded):
    with pytest.raises(ValueError, match=r"latent must have 16 channels .* got shape \[1, 4,"):
        fit(loaded.model, latent=wire(channels=4))


def test_refuses_another_family_by_its_name(host):
    other = lean_models.built("Lumina2", lean_models.LUMINA_2)
    with pytest.raises(ValueError, match=r"plans for Z-Image, this model is Lumina2"):
        fit(other)
    assert not other.object_patches


def test_refuses_what_cannot_run_and_names_what_would(loaded):
    with pytest.raises(ValueError, match=r"does not fit: .* short; what would fit: .*\dx\d"):
        fit(loaded.model, budget_gib=1.0, width=16384, height=16384)
    with pytest.raises(ValueError, match="does not fit"):  # below the text encoder's embedding
        fit(loaded.model, budget_gib=0.25)


def test_planned_again_when_the_sampling_begins(loaded, caplog):
    """A larger latent than the plan's, a longer prompt and a LoRA that came after the node."""
    patched, _, _ = fit(loaded.model, budget_gib=2.0)
    with_lora = patched.clone()
    name = "diffusion_model.layers.0.feed_forward.w1.weight"
    matrix = torch.zeros(loaded.model.model.diffusion_model.layers[0].feed_forward.w1.weight.shape)
    with_lora.add_patches({name: (matrix,)})
    with caplog.at_level(logging.INFO):
        sample(with_lora, noise=latent(32))
    planned = [r.getMessage() for r in caplog.records if "256x256, batch 1, 7 text" in r.message]
    assert planned and "budget 2.00 GiB: fits" in planned[0]
    from pack.nodes.host.fit_patch import weight_bytes

    assert weight_bytes(with_lora) == loaded.model.model_size() + matrix.nbytes


def test_a_sampling_that_cannot_fit_fails_before_its_first_step(loaded):
    patched, _, _ = fit(loaded.model, budget_gib=1.0)
    huge = torch.zeros(1, 16, 16384, 16384, device="meta")
    factor = loaded.model.model.memory_usage_factor
    with pytest.raises(ValueError, match="does not fit"):
        prepare(patched, huge)
    assert loaded.model.model.memory_usage_factor == factor


def test_tight_asks_for_smaller_groups_and_keeps_the_picture(loaded):
    """smallest takes one head at a time, and the result is the same to the bit."""
    patched, _, report = fit(loaded.model, prefer="smallest")
    assert "Attention Slice max" in report
    assert torch.equal(sample(patched).latent, sample(loaded.model).latent)
    assert sample(patched).heads == {1}


def test_the_last_of_two_nodes_counts(loaded, caplog):
    first, _, _ = fit(loaded.model, budget_gib=3.0)
    second, _, _ = fit(first, budget_gib=2.0)
    with caplog.at_level(logging.INFO):
        assert torch.equal(sample(second).latent, sample(loaded.model).latent)
    text = " ".join(r.getMessage() for r in caplog.records)
    assert (
        "budget 2.00 GiB" in text and "batch 1, 7 text tokens, prefer balance; budget 3" not in text
    )


def test_apply_gradient_checkpoint_behind_it_counts(loaded):
    both = lean_models.lean(fit(loaded.model)[0])
    assert torch.equal(sample(both).latent, sample(loaded.model).latent)


def test_a_video_vae_stays_stock(loaded):
    other = kl_vae()
    other.latent_dim = 3
    _, vae, _ = fit(loaded.model, vae=other)
    assert vae is other


def test_the_vae_takes_what_fits(loaded):
    """At 2048x2048, speed needs more than 3 GiB and smallest less: chosen at the call."""
    from pack.nodes.host.lean_vae import Call
    from pack.nodes.memory.planner import Planner
    from pack.nodes.memory.shapes import Request
    from pack.nodes.memory.stages import published_models
    from pack.nodes.memory.vae_plan import VaeSizes

    sizes = {name: getattr(VaeSizes(), name) for name in VaeSizes.__dataclass_fields__}
    call = Call(sizes, 2048, 2048, torch.bfloat16, torch.device("cuda"))
    planner = Planner(published_models(), Request(2048, 2048), 0, 0, "speed")
    chosen = [planner.vae_choice(call, int(room * GIB)).prefer for room in (8, 2.5, 1)]
    assert chosen == ["speed", "balance", "smallest"]


def test_speed_of_a_copy_is_not_measured_without_a_card(loaded):
    from pack.nodes.host import budget

    assert budget.copy_bytes_per_s(loaded.model.load_device) is None
    assert budget.room_bytes(loaded.model.load_device) is None
    assert budget.fence_bytes(loaded.model.load_device, GIB) == 0
    assert budget.limit_pages(loaded.model, GIB) is None
