"""Apply Gradient Checkpoint beside the host's own features and other packs' patches."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pack.testing import attention_models, lean_models
from pack.testing.lean_models import CHUNK, assert_same, built, latent, lean, prompt, sample, sliced

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.fixture(scope="module")
def pipeline(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder)


@pytest.fixture(scope="module")
def z_image(pipeline: Any) -> Any:
    return pipeline.model


# What is asked of the model.


def test_prompts_of_differing_lengths_with_cfg(z_image):
    assert_same(z_image, lean(z_image), cfg=3.0, positive=prompt(40), negative=prompt(7, seed=5))


def test_prompts_of_equal_length_share_a_batch(z_image):
    assert_same(z_image, lean(z_image), cfg=3.0, rounding=True)


def test_batch_of_pictures(z_image):
    assert_same(z_image, lean(z_image), noise=latent(batch=2), rounding=True)


@pytest.mark.parametrize("shape", [(1, 16, 46, 49), (1, 16, 17, 64)])
def test_sizes_that_are_padded(z_image, shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert_same(z_image, lean(z_image), noise=noise)


def test_picture_to_picture(z_image):
    options = {"latent_image": latent(seed=8), "denoise": 0.5}
    assert_same(z_image, lean(z_image), **options)
    assert not torch.equal(sample(z_image, **options).latent, sample(z_image).latent)


def test_inpainting(z_image):
    mask = torch.zeros(1, 1, 48, 48)
    mask[..., 10:30, 10:30] = 1
    options = {"latent_image": latent(seed=8), "noise_mask": mask}
    got = assert_same(z_image, lean(z_image), **options)
    torch.testing.assert_close(got.latent[..., :10, :], options["latent_image"][..., :10, :])


@pytest.mark.parametrize("blocks", ["main layers", "every second", "refiners only"])
def test_choices_of_blocks(z_image, blocks):
    assert_same(z_image, lean(z_image, blocks=blocks))


# Patches of the host and of other packs.


@pytest.fixture
def handovers(monkeypatch):
    """Reasons for which requests went to the host's own forward."""
    from pack.nodes.host.denoiser import forward

    reasons, why_not = [], forward._why_not_plain

    def noted(*args: Any) -> str | None:
        reason = why_not(*args)
        if reason is not None:
            reasons.append(reason)
        return reason

    monkeypatch.setattr(forward, "_why_not_plain", noted)
    return reasons


def test_double_block_patches(z_image, handovers):
    """They hold the first block's input over all blocks, and write into what they get.

    Bug: the host's own forward ran, with 172 MiB for 90 at 1024x1024.
    """

    def patched(model: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []
        held: list[torch.Tensor] = []

        def double(args: dict[str, Any]) -> dict[str, Any]:
            if args["block_index"] == 0:
                held[:] = [args["img_input"], args["img_input"].clone()]
            assert args["img_input"].data_ptr() == held[0].data_ptr()
            assert torch.equal(*held)
            seen.append((args["block_index"], args["img"].shape, args["txt"].shape))
            args["img"] += 0.1 * args["img_input"]
            return {"img": args["img"], "txt": 0.9 * args["txt"]}

        def refiner(args: dict[str, Any]) -> dict[str, Any]:
            assert args["img"].data_ptr() != args["img_input"].data_ptr()
            seen.append((args["block_type"], args["block_index"], args["txt"].shape))
            return {"img": args["img"] + 0.1 * args["img_input"]}

        clone = model.clone()
        clone.set_model_double_block_patch(double)
        clone.set_model_noise_refiner_patch(refiner)
        return clone, seen

    (stock, seen_stock), (ours, seen_ours) = patched(z_image), patched(lean(z_image))
    assert_same(stock, ours)
    assert seen_stock == seen_ours and len(seen_ours) == 4
    assert_same(stock, lean(stock))
    assert handovers == []
    assert not torch.equal(sample(stock).latent, sample(z_image).latent)


def test_patches_get_what_the_host_gives_them(z_image):
    """To the bit, in every block: also the table, the time, and the latent."""

    def noting(model: Any) -> tuple[Any, list[dict[str, Any]]]:
        seen: list[dict[str, Any]] = []

        def patch(args: dict[str, Any]) -> dict[str, Any]:
            held = {key: value for key, value in args.items() if key != "transformer_options"}
            seen.append({k: v.clone() if torch.is_tensor(v) else v for k, v in held.items()})
            args["img"] *= 1.01
            return {}

        clone = model.clone()
        for _ in range(2):
            clone.set_model_double_block_patch(patch)
        clone.set_model_noise_refiner_patch(patch)
        return clone, seen

    (stock, wanted), (ours, got) = noting(z_image), noting(lean(z_image, prefer="smallest"))
    for model in (stock, ours):
        sample(model, noise=latent(33, batch=2), positive=prompt(batch=2))
    assert len(wanted) == len(got) == 6
    for one, two in zip(wanted, got, strict=True):
        assert one.keys() == two.keys()
        for key, value in one.items():
            same = torch.equal(value, two[key]) if torch.is_tensor(value) else value == two[key]
            assert same, key


@pytest.mark.parametrize("name", ["double_block", "noise_refiner"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_patch_that_keeps_what_it_got(z_image, name, batch):
    """Bug: the next block wrote over it, and the picture was another."""
    stock = z_image.clone()
    kept: list[Any] = []

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        image = args["img"]
        before = kept[-1] if kept and args["block_index"] else image
        kept.append(image)
        return {"img": image + 0.5 * (image - before)}

    getattr(stock, f"set_model_{name}_patch")(patch)
    given: dict[str, Any] = {"noise": latent(33, batch=batch), "positive": prompt(batch=batch)}
    assert_same(stock, lean(stock), rounding=batch > 1, **given)


@pytest.mark.parametrize("name", ["double_block", "noise_refiner"])
def test_a_patch_of_one_kind_alone(z_image, name):
    stock = z_image.clone()

    def patch(args: dict[str, Any]) -> dict[str, Any]:
        return {**args, "img": args["img"] + 0.1 * args["img_input"]}

    getattr(stock, f"set_model_{name}_patch")(patch)
    assert_same(stock, lean(stock))
    assert not torch.equal(sample(stock).latent, sample(z_image).latent)


@pytest.mark.parametrize("has_siglip", [False, True])
def test_reference_latents_of_omni(has_siglip, handovers):
    """Two runs of tokens take the modulation of time zero; two pictures of two sizes."""
    model = built("ZImage", {**lean_models.Z_IMAGE, "siglip_feat_dim": 40 if has_siglip else None})
    more: dict[str, Any] = {
        "reference_latents": [latent(32, seed=9), latent(20, seed=10)],
        "reference_latents_text_embeds": [
            prompt(tokens, seed=tokens)[0][0] for tokens in (9, 5, 3)
        ],
    }
    if has_siglip:
        features = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(3))
        vision = SimpleNamespace(image_sizes=[(3, 64, 64)], last_hidden_state=features)
        more["clip_vision_outputs"] = [vision]
    got = assert_same(model, lean(model), positive=prompt(**more))
    assert not torch.equal(got.latent, sample(model).latent)
    # One forward with them, one without, alternating.
    assert_same(model, lean(model), cfg=2.0, positive=prompt(**more))
    # Without texts of their own, and with patches of other nodes.
    del more["reference_latents_text_embeds"]
    model.set_model_double_block_patch(lambda args: {"img": args["img"] + args["img_input"]})
    model.set_model_noise_refiner_patch(lambda args: {"img": 0.9 * args["img"]})
    assert_same(model, lean(model, prefer="smallest"), positive=prompt(**more))
    assert handovers == []


def test_lumina_2(handovers):
    model = built("Lumina2", lean_models.LUMINA_2)
    got = assert_same(model, lean(model))
    assert got.heads == {3}  # of 6, in two groups
    assert_same(model, lean(model, head_groups=1))
    model.set_model_double_block_patch(lambda args: {"img": args["img"] + args["img_input"]})
    model.set_model_noise_refiner_patch(lambda args: {"img": 0.9 * args["img"]})
    assert_same(model, lean(model))
    assert handovers == []


def forward(host: Any, model: Any, x: torch.Tensor) -> torch.Tensor:
    """One call of the denoiser, with the model's own patches and wrappers."""
    host.model_management.load_models_gpu([model])
    denoiser = model.model.diffusion_model
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    with torch.inference_mode():
        return denoiser(x, torch.full((1,), 0.4), prompt()[0][0], 7, transformer_options=options)


@pytest.mark.parametrize("frames", [None, 1, 2])
def test_ming_image(host, caplog, frames):
    """The same class: its latents have frames, and padding moves the picture's positions alone."""
    import comfy.ldm.lumina.model as lumina

    if "masked_pad_multiple" not in inspect.signature(lumina.NextDiT).parameters:
        pytest.skip(f"ComfyUI {host.version} does not know Ming-Image")
    caplog.set_level("INFO")
    ming = {"image_model": "ming_image", "pad_tokens_multiple": None, "masked_pad_multiple": 32}
    model = built("ZImage", {**lean_models.Z_IMAGE, **ming})
    x = latent() if frames is None else torch.stack([latent(seed=i) for i in range(frames)], dim=2)
    wanted = forward(host, model, x)
    assert torch.equal(forward(host, lean(model), x), wanted)
    assert "the model is Ming-Image: only the blocks run in pieces" in caplog.text


def test_the_attention_that_a_checkpoint_chose(host, caplog):
    """Newer hosts keep a choice in each attention layer; the block hands it on as they do."""
    model = built("ZImage", lean_models.Z_IMAGE)
    plain, heads = forward(host, model, latent()), []
    attention = model.model.diffusion_model.layers[0].attention
    if not hasattr(attention, "comfy_attention"):
        pytest.skip(f"checkpoints choose no attention on ComfyUI {host.version}")

    def chosen(*args: Any, **kwargs: Any) -> torch.Tensor:
        heads.append(args[3])
        return 0.5 * attention_models.function("attention_basic")(*args, **kwargs)

    attention.comfy_attention.function = chosen
    wanted = forward(host, model, latent())
    assert not torch.equal(wanted, plain) and heads == [3]
    torch.testing.assert_close(forward(host, lean(model), latent()), wanted)
    assert heads[1:] == [2, 2, 1, 1]
    sliced(model)
    assert "the attention that the checkpoint chose is not used" in caplog.text


def test_attention_override_of_another_pack(z_image):
    """It is called for each group of heads and each chunk, and what it returns counts."""
    stock = z_image.clone()
    calls: list[tuple[int, ...]] = []

    def override(function: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((*q.shape[1:3], k.shape[2]))
        return 0.5 * function(q, k, v, *args, **kwargs)

    stock.model_options["transformer_options"]["optimized_attention_override"] = override
    wanted = sample(stock).latent
    assert not torch.equal(wanted, sample(z_image).latent)
    calls.clear()
    assert torch.equal(sample(lean(stock)).latent, wanted)
    main = [(2, CHUNK, 608), (2, 608 - CHUNK, 608), (1, CHUNK, 608), (1, 608 - CHUNK, 608)]
    assert calls[-8:] == 2 * main


@pytest.mark.parametrize("mode", ["auto", "heads", "max"])
def test_attention_slice_in_either_order(z_image, mode):
    for both in (lean(sliced(z_image, mode)), sliced(lean(z_image), mode)):
        assert assert_same(z_image, both).heads == ({1} if mode == "max" else {1, 2})


# Clones.


def test_clones_side_by_side(z_image):
    wanted = sample(z_image).latent
    ours = lean(z_image)
    other = lean(z_image, blocks="main layers", chunk_tokens=320)
    for model, longest in [
        (ours, 352), (z_image, 608), (ours.clone().clone(), 352), (other, 576),
        (z_image.clone(), 608), (ours, 352), (lean(ours), 352), (lean(other), 352),
    ]:  # fmt: skip
        run = sample(model)
        assert torch.equal(run.latent, wanted)
        assert max(run.queries) == longest


def test_the_same_node_twice_is_the_last_one(z_image):
    import comfy.patcher_extension
    from pack.nodes.host.denoiser.block import LeanBlock

    once = lean(z_image)
    twice = lean(once, blocks="main layers")
    assert assert_same(z_image, twice).queries == {32, 576, 256, 352}
    names = [n for n, patch in twice.object_patches.items() if type(patch) is LeanBlock]
    assert names == ["diffusion_model.layers.0", "diffusion_model.layers.1"]
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    assert not any(twice.wrappers.get(kind, {}).values())
    assert [len(w) for w in lean(once).wrappers[kind].values()] == [1]
    assert len(once.object_patches) == 6  # the first one stays as it was


def test_a_copy_with_weights_of_its_own(host, z_image):
    """As the host makes one for another GPU, or without dynamic VRAM."""
    if not hasattr(type(z_image), "deepclone_multigpu"):
        pytest.skip("this host makes no such copies")
    ours = lean(z_image)
    for copy in (ours.deepclone_multigpu(torch.device("cpu")), ours.clone(force_deepcopy=True)):
        assert copy.model is not ours.model
        for name, block in copy.object_patches.items():
            stock = copy.model.get_submodule(name)
            assert block.stock[0] is stock
            assert block.attention.qkv.weight is stock.attention.qkv.weight
        assert_same(z_image, copy)
        with torch.no_grad():
            copy.model.diffusion_model.layers[0].attention.out.weight.mul_(2)
        assert not torch.equal(sample(copy).latent, sample(z_image).latent)
    assert_same(z_image, ours)
