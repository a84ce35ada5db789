"""Apply Gradient Checkpoint leaves nothing behind, and refuses what it cannot do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing import attention_models, lean_models, stock_forward
from pack.testing.lean_models import (
    assert_same,
    built,
    fail,
    lean,
    sample,
    sliced,
    stopping,
)

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.fixture(scope="module")
def z_image(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).model


def state(model: Any) -> dict[str, Any]:
    """Everything on the shared model that a patch could leave something on."""
    found: dict[str, Any] = {
        "factor": model.model.memory_usage_factor,
        "patches": {name: id(patch) for name, patch in model.object_patches.items()},
        "options": repr(model.model_options),
    }
    for name, module in model.model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v}
        attributes = frozenset(vars(module))
        found[name] = (id(module), type(module), attributes, hooks, module.training)
    for name, tensor in model.model.state_dict().items():
        found[f"value of {name}"] = tensor.data_ptr()
    return found


@pytest.mark.parametrize("blocks", ["all", pytest.param("main layers", marks=pytest.mark.once)])
@pytest.mark.parametrize("fault", ["cancelled", "exception"])
def test_a_fault_in_mid_forward_leaves_nothing(host, z_image, blocks, fault):
    management = host.model_management

    def cancel() -> None:
        management.interrupt_current_processing(True)

    wanted = sample(z_image).latent
    management.load_models_gpu([z_image])
    before = state(z_image)
    ours = lean(z_image, blocks=blocks)
    stop = cancel if fault == "cancelled" else fail
    expected = management.InterruptProcessingException if fault == "cancelled" else RuntimeError
    for at in (1, 6, 11):  # text refiner, image refiner, main layers
        try:
            with pytest.raises(expected):
                sample(stopping(ours, stop, at=at))
        finally:
            management.interrupt_current_processing(False)
        assert torch.equal(sample(ours).latent, wanted)
        management.load_models_gpu([z_image])
        assert state(z_image) == before
        assert not z_image.object_patches_backup
        assert torch.equal(sample(z_image).latent, wanted)


def test_a_fault_does_not_keep_tensors_alive(host, z_image):
    """No frame, module or global of ours holds the stream after an exception was dealt with."""
    import gc

    def large_tensors() -> int:
        gc.collect()
        found = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-1:] == (384,)]
        return len([t for t in found if 608 in t.shape])

    ours = lean(z_image)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            sample(stopping(ours, fail, at=9))
    assert large_tensors() == 0


@pytest.mark.parametrize("blocks", ["all", "refiners only"])
def test_the_models_own_patches_and_weights_stay_as_they_were(host, z_image, blocks):
    """Also after whole samplings, and the node itself writes nothing."""
    host.model_management.load_models_gpu([z_image])
    before = state(z_image)
    ours = lean(z_image, blocks=blocks)
    assert state(z_image) == before
    sample(ours)
    host.model_management.load_models_gpu([z_image])
    assert state(z_image) == before


# Models and patches of others.


def test_another_model_is_refused_by_name():
    model = attention_models.stable_diffusion_3()
    before = state(model)
    with pytest.raises(ValueError, match=r"Lumina 2, FLUX.1, .*, this model is SD3: use Attention"):
        lean(model)
    assert state(model) == before
    shapes = ((1, 16, 8, 8), (1, 5, 48), (1, 32))
    latent, context, pooled = (attention_models.draw(*shape, seed=1) for shape in shapes)
    with stock_forward.installed(sliced(model)) as options, torch.inference_mode():
        made = model.model.diffusion_model(
            latent, torch.ones(1), context=context, y=pooled, transformer_options=options
        )
    assert made.isfinite().all()


def test_the_pixel_space_variant_is_refused(host):
    import comfy.model_base

    if not hasattr(comfy.model_base, "ZImagePixelSpace"):
        pytest.skip("this host has no ZImagePixelSpace")
    config = {
        **lean_models.Z_IMAGE,
        "image_model": "zimage_pixel",
        "patch_size": 4,
        "in_channels": 3,
        "decoder_hidden_size": 64,
        "decoder_in_channels": 48,
        "decoder_num_res_blocks": 1,
        "decoder_max_freqs": 4,
    }
    with pytest.raises(ValueError, match="this model is ZImagePixelSpace"):
        lean(built("ZImagePixelSpace", config))


class OtherBlock(torch.nn.Module):
    """What another pack puts in a block's place: the same, and a little more."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return 1.1 * self.block(*args, **kwargs)


def with_other_block(model: Any, *indices: int) -> Any:
    clone = model.clone()
    for index in indices or (0,):
        name = f"diffusion_model.layers.{index}"
        clone.add_object_patch(name, OtherBlock(clone.get_model_object(name)))
    return clone


def test_blocks_that_were_all_replaced_are_refused(z_image):
    with pytest.raises(ValueError, match="another node replaced every block: place this node bef"):
        lean(with_other_block(z_image, 0, 1))


def test_a_block_that_was_replaced_in_the_model_itself_is_refused_by_its_class(z_image):
    layers = z_image.model.diffusion_model.layers
    block = layers[0]
    layers[0] = OtherBlock(block)
    try:
        with pytest.raises(ValueError, match=r"layers\.0 must be ComfyUI's own block, got OtherB"):
            lean(z_image)
    finally:
        layers[0] = block
    assert not z_image.object_patches


def test_a_block_of_another_pack_is_kept(z_image, caplog):
    caplog.set_level(logging.INFO)
    plain = sample(z_image).latent
    stock = with_other_block(z_image)
    for ours in (lean(stock), with_other_block(lean(z_image))):
        caplog.clear()
        assert_same(stock, ours)
        assert "another node changed a block: only the blocks run in pieces" in caplog.text
    assert not torch.equal(sample(stock).latent, plain)


def test_a_block_of_another_pack_on_another_clone_is_none_of_ours(z_image):
    """The shared model is in use with that block while our node runs on a clone without it."""
    sample(with_other_block(z_image))
    ours = lean(z_image)
    assert sorted(ours.object_patches) == sorted(lean(z_image).object_patches)
    assert_same(z_image, ours)


@pytest.mark.parametrize("name", ["attention", "feed_forward"])
@pytest.mark.parametrize("comes_first", [False, True])
def test_a_patched_forward_inside_a_block_is_kept(host, z_image, name, comes_first):
    """Other packs replace `layers.N.attention.forward`: ours must not step over that."""
    host.model_management.load_models_gpu([z_image])
    before = state(z_image)
    path = f"diffusion_model.layers.0.{name}.forward"

    def patched(model: Any) -> Any:
        clone = model.clone()
        original = clone.get_model_object(path)
        clone.add_object_patch(path, lambda *a, **kw: 1.1 * original(*a, **kw))
        return clone

    stock = patched(z_image)
    wanted = sample(stock).latent
    assert not torch.equal(wanted, sample(z_image).latent)
    ours = lean(patched(z_image)) if comes_first else patched(lean(z_image))
    assert torch.equal(sample(ours).latent, wanted)
    host.model_management.load_models_gpu([z_image])
    after = state(z_image)
    for model in (before, after):  # the host puts the bound method back on the module
        for key, value in model.items():
            if isinstance(value, tuple) and len(value) == 5:
                model[key] = (*value[:2], value[2] - {"forward"}, *value[3:])
    assert after == before


def test_hooks_on_a_block_are_called(z_image):
    denoiser = z_image.model.diffusion_model
    calls = []
    handles = [
        module.register_forward_hook(lambda *_: calls.append(1))
        for module in (denoiser.layers[0].attention, denoiser.layers[0].attention.qkv)
    ]
    try:
        sample(z_image)
        stock_calls, calls[:] = len(calls), []
        sample(lean(z_image))
        assert len(calls) >= stock_calls == 2
    finally:
        for handle in handles:
            handle.remove()


# torch.compile.


@pytest.mark.slow
@pytest.mark.parametrize("comes_first", [False, pytest.param(True, marks=pytest.mark.once)])
def test_torch_compile_of_the_host(comes_first):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    z_image = built("ZImage", {**lean_models.Z_IMAGE, "n_layers": 1, "n_refiner_layers": 1})

    def compiled(model: Any) -> Any:
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="aot_eager")
        return clone

    wanted = sample(z_image).latent
    ours = lean(compiled(z_image)) if comes_first else compiled(lean(z_image))
    try:
        with torch.no_grad():
            got = sample(ours)
            again = sample(ours)
    finally:
        torch.compiler.reset()
    for run in (got, again):
        assert (run.latent - wanted).norm() / wanted.norm() < 1e-5
    assert torch.equal(sample(z_image).latent, wanted)
