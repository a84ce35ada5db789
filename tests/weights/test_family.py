"""Which model a file holds; what is accepted, and what the user is told of the rest."""

from __future__ import annotations

import pytest
from pack.nodes.weights import family
from pack.nodes.weights.family import check_text_encoder, check_vae, describe, z_image
from pack.nodes.weights.header import WeightsError
from pack.testing.fake_files import component, qwen3_shapes, vae_shapes, z_image_shapes

PREFIXES = ["", "model.diffusion_model.", "model.model.", "net.", "model."]


def refusal(check, *args, **kwargs) -> str:
    with pytest.raises(WeightsError) as caught:
        check(*args, **kwargs)
    message = str(caught.value)
    assert message.isprintable()
    return message


def prefixed(shapes: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("diffusers", [True, False], ids=["diffusers", "single file"])
def test_z_image(prefix, diffusers):
    shapes = z_image_shapes(dim=8, text_width=4, layers=5, diffusers=diffusers)
    found = z_image(component(prefixed(shapes, prefix), label="Z-Image-Turbo/transformer/"))
    assert found == family.ZImage(
        name="Z-Image-Turbo",
        dim=8,
        layers=5,
        text_width=4,
        latent_channels=16,
        prefix=prefix,
        is_diffusers=diffusers,
    )


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_latent_channels_from_the_patch_embedding(dtype):
    shapes = {**z_image_shapes(), "x_embedder.weight": (8, 128)}
    assert z_image(component(shapes, dtype=dtype)).latent_channels == 32


def test_latent_channels_of_packed_weights():
    """Two 4-bit values in a byte: the width stored is half of the true one."""
    shapes = {**z_image_shapes(), "x_embedder.weight": (8, 32)}
    assert z_image(component(shapes, dtype="U8")).latent_channels == 16


@pytest.mark.parametrize(
    ("label", "hint", "name"),
    [
        ("z_image_turbo_bf16.safetensors", "", "Z-Image-Turbo"),
        ("Z-Image-Turbo/transformer/", "ZImagePipeline", "Z-Image-Turbo"),
        ("sub/ZIMAGE-TURBO.safetensors", "", "Z-Image-Turbo"),
        ("Z-Image/transformer/", "ZImagePipeline", "Z-Image"),
        ("z_image_bf16.safetensors", "", "Z-Image"),
        ("z_image_base_bf16.safetensors", "", "Z-Image-Base"),
        ("Z-Image-Edit/transformer/", "", "Z-Image-Edit"),
        ("x.safetensors", "ZImageOmniPipeline", "Z-Image-Omni"),
        ("turbocharged.safetensors", "", "Z-Image"),
        ("my_edition.safetensors", "", "Z-Image"),
    ],
)
def test_variant_names(label, hint, name):
    assert z_image(component(z_image_shapes(), label=label), hint).name == name


def test_omni_is_told_by_its_tensors():
    shapes = {**z_image_shapes(), "siglip_embedder.0.weight": (4,)}
    assert z_image(component(shapes, label="Z-Image-Turbo/")).name == "Z-Image-Omni"


CHOOSE = "choose z_image_turbo_bf16.safetensors or a folder of Z-Image-Turbo"


@pytest.mark.parametrize(
    ("name", "looks_like"),
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
        ("single_transformer_blocks.0.attn.norm_k.weight", "Flux"),
        (
            "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight",
            "Stable Diffusion 3",
        ),
        ("model.diffusion_model.label_emb.0.0.weight", "Stable Diffusion XL"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion"),
        ("down_blocks.0.attentions.0.norm.weight", "Stable Diffusion"),
        ("noise_refiner.0.attention.k_norm.weight", "Lumina 2"),
        ("ref_image_patch_embedder.weight", "OmniGen 2"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image"),
        ("blocks.0.self_attn.lora_A.weight", "a LoRA"),
        ("lora_unet_layers_0_attention_qkv.alpha", "a LoRA"),
        ("diffusion_model.layers.0.attention.qkv.lora_down.weight", "a LoRA"),
        ("control_layers.0.attention.qkv.weight", "a ControlNet for Z-Image"),
        ("decoder.conv_in.weight", "a VAE"),
        ("taesd_decoder.1.weight", "a VAE (tiny)"),
        ("decoder.middle.0.residual.0.gamma", "a VAE (video)"),
        ("model.layers.0.post_attention_layernorm.weight", "a text encoder (Llama)"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder (CLIP)"),
        ("head.modulation", "Wan"),
        ("foo.weight", "a model of unknown kind (1 tensors, foo.weight ...)"),
    ],
)
def test_another_family_is_named(name, looks_like):
    assert refusal(z_image, component({name: (1,)})) == (
        f"x.safetensors is not Z-Image: it looks like {looks_like}: {CHOOSE}"
    )


def test_a_prefix_that_the_host_does_not_know():
    """Bug: accepted here, refused by the host in the middle of loading."""
    shapes = prefixed(z_image_shapes(), "diffusion_model.")
    assert refusal(z_image, component(shapes)) == (
        "x.safetensors is not Z-Image: it looks like Z-Image in names that ComfyUI does not load: "
        f"{CHOOSE}"
    )


def test_lumina_2_of_the_same_class_is_not_z_image():
    """Its modulation has another number, and it needs another sampler and text encoder."""
    shapes = {
        name.replace("adaLN_modulation.0", "adaLN_modulation.1"): shape
        for name, shape in z_image_shapes().items()
    }
    shapes["noise_refiner.0.attention.k_norm.weight"] = (8,)
    assert refusal(z_image, component(shapes)) == (
        f"x.safetensors is not Z-Image: it looks like Lumina 2: {CHOOSE}"
    )


@pytest.mark.parametrize("prefix", PREFIXES)
def test_z_image_in_pixel_space_is_another_model(prefix):
    shapes = {**z_image_shapes(), "dec_net.cond_embed.weight": (8, 8)}
    assert refusal(z_image, component(prefixed(shapes, prefix))) == (
        f"x.safetensors is not Z-Image: it looks like Z-Image in pixel space: {CHOOSE}"
    )


@pytest.mark.parametrize("has_mark", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_ming_image_is_another_model(prefix, has_mark):
    """The host runs it with the class of Z-Image; files of its Layer variant bear a mark."""
    shapes = {**z_image_shapes(), "__ming_image__": (0,)}
    if not has_mark:
        del shapes["cap_pad_token"], shapes["__ming_image__"]
    assert refusal(z_image, component(prefixed(shapes, prefix))) == (
        f"x.safetensors is not Z-Image: it looks like Ming-Image: {CHOOSE}"
    )


def test_a_lora_of_z_image_is_a_lora():
    shapes = {
        f"diffusion_model.{name.removesuffix('.weight')}.lora_{side}.weight": (1, 1)
        for name in z_image_shapes()
        for side in "AB"
    }
    assert describe(component(shapes).tensors) == "a LoRA"


def test_an_empty_file():
    assert refusal(z_image, component({})) == (
        "x.safetensors is not Z-Image: it looks like a model of unknown kind (0 tensors, none "
        f"...): {CHOOSE}"
    )


@pytest.mark.parametrize("diffusers", [True, False], ids=["diffusers", "single file"])
def test_every_missing_tensor_that_was_looked_at_is_noticed(diffusers):
    """None of the names in the list can be taken away without a refusal."""
    shapes = z_image_shapes(layers=3, diffusers=diffusers)
    for name in shapes:
        fewer = {n: s for n, s in shapes.items() if n != name}
        message = refusal(z_image, component(fewer))
        assert message.startswith("x.safetensors "), name


def test_a_missing_layer_is_named():
    shapes = {n: s for n, s in z_image_shapes(layers=3).items() if not n.startswith("layers.1.")}
    assert refusal(z_image, component(shapes)) == "x.safetensors lacks layers.1: download it again"


def test_describe_our_own():
    assert describe(component(z_image_shapes()).tensors) == "Z-Image"
    assert describe(component(qwen3_shapes(width=2560)).tensors) == "a text encoder (Qwen3-4B)"
    assert describe(component(vae_shapes()).tensors) == "a VAE"


def test_describe_a_text_encoder_whose_norm_has_no_axis():
    """Bug: IndexError."""
    name = "model.layers.0.post_attention_layernorm.weight"
    assert describe(component({**qwen3_shapes(), name: ()}).tensors) == "a text encoder"


def test_text_encoder_of_the_right_width():
    told = check_text_encoder(component(qwen3_shapes(width=8, layers=4)), text_width=8)
    assert told["hidden_size"] == 8
    assert told["num_hidden_layers"] == 4


def test_text_encoder_of_another_width():
    found = component(qwen3_shapes(width=4096), label="qwen_3_8b.safetensors")
    assert refusal(check_text_encoder, found, text_width=2560) == (
        "qwen_3_8b.safetensors is Qwen3-8B, 4096 channels wide, this Z-Image reads 2560 channels "
        "(Qwen3-4B): choose a text encoder of that width"
    )


@pytest.mark.parametrize(
    ("shapes", "looks_like"),
    [
        (z_image_shapes(), "Z-Image"),
        (vae_shapes(), "a VAE"),
        ({"encoder.block.0.layer.0.SelfAttention.k.weight": (4, 4)}, "a text encoder (T5)"),
        (
            {**qwen3_shapes(), "model.layers.0.post_feedforward_layernorm.weight": (8,)},
            "a text encoder (Gemma)",
        ),
    ],
    ids=["Z-Image", "VAE", "T5", "Gemma"],
)
def test_no_text_encoder_of_z_image(shapes, looks_like):
    assert refusal(check_text_encoder, component(shapes), text_width=8) == (
        f"x.safetensors is not the text encoder of Z-Image: it looks like {looks_like}: "
        "choose qwen_3_4b.safetensors"
    )


@pytest.mark.parametrize(
    "shapes",
    [
        vae_shapes(latent_channels=16),
        {"taesd_decoder.1.weight": (64, 16, 3, 3)},
        {"bn.running_mean": (16,), "decoder.conv_in.weight": (4, 4, 3, 3)},
    ],
    ids=["AutoencoderKL", "TAESD", "batch norm of 2x2 patches"],
)
def test_vae_with_16_latent_channels(shapes):
    assert check_vae(component(shapes), latent_channels=16) is None


@pytest.mark.parametrize(
    ("shapes", "channels"),
    [
        (vae_shapes(latent_channels=4), 4),
        ({"taesd_decoder.1.weight": (64, 4, 3, 3)}, 4),
        ({**vae_shapes(latent_channels=32), "bn.running_mean": (128,)}, 128),
    ],
    ids=["Stable Diffusion", "TAESD", "Flux 2"],
)
def test_vae_with_other_latent_channels(shapes, channels):
    assert refusal(check_vae, component(shapes), latent_channels=16) == (
        f"x.safetensors has {channels} latent channels, Z-Image needs 16: "
        "choose ae.safetensors (the VAE of Flux)"
    )


@pytest.mark.parametrize(
    ("shapes", "looks_like"),
    [
        (z_image_shapes(), "Z-Image"),
        (qwen3_shapes(width=2560), "a text encoder (Qwen3-4B)"),
        ({"decoder.conv_in.weight": (4, 32, 3, 3, 3)}, "a VAE (video)"),
        ({"decoder.middle.0.residual.0.gamma": (4, 1, 1, 1)}, "a VAE (video)"),
    ],
    ids=["Z-Image", "text encoder", "Hunyuan", "Wan"],
)
def test_no_image_vae(shapes, looks_like):
    assert refusal(check_vae, component(shapes), latent_channels=16) == (
        f"x.safetensors is not the VAE of Z-Image: it looks like {looks_like}: "
        "choose ae.safetensors"
    )


def test_each_signature_can_be_reached():
    """A row that an earlier row swallows names nothing."""
    for row, (name, parts) in enumerate(family._SIGNATURES):
        tensor = "x.".join(parts)
        assert describe(component({tensor: (1,)}).tensors) == name, (row, tensor)
