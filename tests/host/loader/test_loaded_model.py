"""What the loader node hands on behaves as what the host's own loaders hand on."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing.loading import (
    FOLDER,
    SAME,
    Loaded,
    is_equal,
    load,
    shift_of,
    weights,
    write_tiny_vae,
)


@pytest.fixture(scope="module")
def names(small_files: dict[str, Path]) -> dict[str, str]:
    return {part: path.name for part, path in small_files.items()}


@pytest.fixture(scope="module")
def tiny_vae(host) -> Iterator[str]:
    path = write_tiny_vae(host)
    yield path.name
    path.unlink()


@pytest.fixture(scope="module")
def from_folder(small_folder: Path) -> Loaded:
    return load(FOLDER, SAME, SAME)


def velocity(host, model: Any) -> torch.Tensor:
    """What the model computes for a fixed input."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 8, 8, generator=generator)
    text = torch.randn(1, 5, 64, generator=generator)
    host.model_management.load_models_gpu([model])
    with torch.inference_mode():
        conds = model.model.extra_conds(cross_attn=text, noise=x, device=x.device)
        ready = {k: c.process_cond(batch_size=1, device=x.device).cond for k, c in conds.items()}
        return model.model.apply_model(x, torch.tensor([0.5]), **ready)


def test_a_shift_of_its_own_is_a_clone_that_shares_the_weights(from_folder):
    from pack.nodes.host.loader import load as loaders

    clone = loaders.with_shift(from_folder.model, 1.5)
    assert shift_of(clone) == 1.5
    assert shift_of(from_folder.model) == 3.0
    assert clone.model is from_folder.model.model
    assert clone.cached_patcher_init is from_folder.model.cached_patcher_init


def test_an_encoder_that_the_host_took_for_another_is_refused_by_its_class(from_folder):
    from pack.nodes.host.loader import load as loaders

    clip = copy.copy(from_folder.clip)
    assert loaders._checked(clip) is clip
    clip.cond_stage_model = from_folder.vae.first_stage_model
    with pytest.raises(ValueError, match="must be a Qwen3-4B, ComfyUI read it as Autoenc"):
        loaders._checked(clip)


def test_clones_share_the_weights(from_folder):
    clone = from_folder.model.clone()
    assert clone.is_clone(from_folder.model)
    ours, theirs = weights(from_folder.model), weights(clone)
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)


def test_nothing_of_the_file_is_kept_beside_the_model(from_folder):
    """The weights are ordinary tensors of their own, not views of a mapped shard."""
    for loaded in from_folder:
        for name, tensor in weights(loaded).items():
            assert type(tensor) in (torch.Tensor, torch.nn.Parameter), name
    maps = Path("/proc/self/maps")
    if maps.exists():
        gc.collect()
        shards = [line for line in maps.read_text().splitlines() if "/diffusers/" in line]
        assert [
            line for line in shards if "/transformer/" in line or "/text_encoder/" in line
        ] == []


@pytest.mark.parametrize("shift", [3.0, 1.5])
def test_the_host_can_make_a_second_copy_of_what_came_from_a_folder(tiny_vae, shift):
    """Newer hosts ask for one: a copy per device, or one without dynamic VRAM."""
    found = load(FOLDER, SAME, tiny_vae, shift=shift)
    for patcher in (found.model, found.clip.patcher):
        rebuild, arguments = patcher.cached_patcher_init
        for options in ({}, {"disable_dynamic": True}):
            copy = rebuild(*arguments, **options)
            assert copy.model is not patcher.model
            assert type(copy.model).__name__ == type(patcher.model).__name__
            assert is_equal(copy.model.state_dict(), patcher.model.state_dict())


def lora(shape: tuple[int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, shape[1], generator=generator), torch.randn(
        shape[0], 4, generator=generator
    )


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("style", ["diffusion_model", "transformer", "kohya"])
def test_a_lora_changes_the_weights_by_its_product(
    host, names, tiny_vae, from_folder, style, layout
):
    """The names of single files and of diffusers: there q, k and v are three, in the host one."""
    model = from_folder.model
    if layout == "file":
        model = load(names["transformer"], names["text_encoder"], tiny_vae).model
    dim = 384
    down, up = lora((dim, dim), seed=3)
    module, rows = "layers.1.attention.out", slice(None)
    if style == "transformer":
        name, module = "transformer.layers.1.attention.to_k", "layers.1.attention.qkv"
        rows = slice(dim, 2 * dim)
        file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    elif style == "diffusion_model":
        name = f"diffusion_model.{module}"
        file = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    else:
        name = f"lora_unet_{module.replace('.', '_')}"
        file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}

    before = weights(model)[f"diffusion_model.{module}.weight"].clone()
    stock = velocity(host, model)
    patched, _ = host.sd.load_lora_for_models(model, None, file, 0.5, 0.0)
    changed = velocity(host, patched)
    wanted = before.clone()
    wanted[rows] += 0.5 * (up @ down)
    assert torch.allclose(
        weights(patched)[f"diffusion_model.{module}.weight"], wanted, rtol=1e-5, atol=1e-5
    )
    assert (changed - stock).norm() / stock.norm() > 1e-3

    assert torch.equal(velocity(host, model), stock)
    assert torch.equal(weights(model)[f"diffusion_model.{module}.weight"], before)


def test_a_cancelled_prompt_ends_with_the_hosts_own_exception(host, small_folder, tiny_vae):
    host.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(host.model_management.InterruptProcessingException):
            load(FOLDER, SAME, tiny_vae)
    finally:
        host.model_management.interrupt_current_processing(False)
    assert load(FOLDER, SAME, tiny_vae)
