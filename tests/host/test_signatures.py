"""The table of model families follows the host: what it names, the host detects as that family."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.weights import family
from pack.testing.fake_files import component, qwen3_shapes, z_image_shapes

QK_NORM = "double_blocks.0.img_attn.norm.key_norm.scale"
ADALN = "adaln_single.emb.timestep_embedder.linear_1.bias"
LUMINA = {
    "cap_embedder.1.weight": (2304, 2304),
    "noise_refiner.0.attention.k_norm.weight": (96,),
    "noise_refiner.0.adaLN_modulation.1.weight": (8, 8),
}
Z_IMAGE = {**z_image_shapes(dim=3840), "noise_refiner.0.attention.k_norm.weight": (128,)}
# Family, what the host makes of the tensors (part of its configuration), the tensors.
TRANSFORMERS: list[tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
    ("Z-Image", {"image_model": "lumina2", "z_image_modulation": True}, Z_IMAGE),
    (
        "Z-Image in pixel space",
        {"image_model": "zimage_pixel"},
        {
            **Z_IMAGE,
            "x_embedder.weight": (3840, 3072),
            "dec_net.cond_embed.weight": (8, 8),
            "dec_net.final_layer.linear.weight": (3, 8),
            "dec_net.input_embedder.embedder.0.weight": (8, 67),
        },
    ),
    (
        "Ming-Image",
        {"image_model": "ming_image", "masked_pad_multiple": 32},
        {name: shape for name, shape in Z_IMAGE.items() if name != "cap_pad_token"},
    ),
    ("Ming-Image", {"image_model": "ming_image"}, {**Z_IMAGE, "__ming_image__": (0,)}),
    ("Lumina 2", {"image_model": "lumina2", "n_heads": 24}, LUMINA),
    (
        "NewBie",
        {"image_model": "lumina2", "clip_text_dim": 1024},
        {**LUMINA, "clip_text_pooled_proj.0.weight": (1024,)},
    ),
    (
        "OmniGen 2",
        {"image_model": "omnigen2"},
        {
            "time_caption_embed.timestep_embedder.linear_1.bias": (8,),
            "noise_refiner.0.norm1.linear.weight": (8, 8),
            "ref_image_patch_embedder.weight": (8, 8),
        },
    ),
    (
        "Boogu-Image",
        {"image_model": "boogu"},
        {
            "double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight": (8, 8),
            "noise_refiner.0.norm1.linear.weight": (8, 8),
            "ref_image_patch_embedder.weight": (8, 8),
            "x_embedder.weight": (8, 8),
            "time_caption_embed.caption_embedder.0.weight": (8,),
        },
    ),
    ("Flux", {"image_model": "flux"}, {QK_NORM: (128,), "img_in.weight": (3072, 64)}),
    (
        "Flux 2",
        {"image_model": "flux2"},
        {
            QK_NORM: (128,),
            "img_in.weight": (6144, 128),
            "double_stream_modulation_img.lin.weight": (8, 8),
        },
    ),
    (
        "Chroma",
        {"image_model": "chroma"},
        {
            QK_NORM: (128,),
            "img_in.weight": (3072, 64),
            "distilled_guidance_layer.norms.0.scale": (8,),
        },
    ),
    (
        "Stable Diffusion 3",
        {"patch_size": 2, "depth": 24},
        {
            "joint_blocks.0.context_block.attn.qkv.weight": (8, 8),
            "x_embedder.proj.weight": (1536, 16, 2, 2),
        },
    ),
    (
        "AuraFlow",
        {"n_double_layers": 1},
        {
            "double_layers.0.attn.w1q.weight": (8, 8),
            "positional_encoding": (1, 4, 8),
            "cond_seq_linear.weight": (8, 8),
        },
    ),
    (
        "Hunyuan DiT",
        {"image_model": "hydit1"},
        {
            "mlp_t5.0.weight": (8, 8),
            "x_embedder.proj.weight": (1408, 4, 2, 2),
            "extra_embedder.0.weight": (8, 3968),
        },
    ),
    (
        "Hunyuan Video",
        {"image_model": "hunyuan_video"},
        {
            "txt_in.individual_token_refiner.blocks.0.norm1.weight": (8,),
            "txt_in.input_embedder.weight": (8, 8),
            "img_in.proj.weight": (3072, 16, 1, 2, 2),
            "final_layer.linear.weight": (64, 8),
        },
    ),
    ("Mochi", {"image_model": "mochi_preview"}, {"t5_yproj.weight": (8, 8)}),
    (
        "LTX-Video",
        {"image_model": "ltxv"},
        {
            ADALN: (8,),
            "transformer_blocks.0.attn2.to_k.weight": (2048, 2048),
            "patchify_proj.weight": (8, 8),
        },
    ),
    ("PixArt", {"image_model": "pixart_sigma"}, {"t_block.1.weight": (8, 8)}),
    (
        "Cosmos",
        {"image_model": "cosmos_predict2"},
        {
            "blocks.0.mlp.layer1.weight": (8, 8),
            "blocks.0.adaln_modulation_self_attn.1.weight": (8, 8),
            "x_embedder.proj.1.weight": (2048, 68),
        },
    ),
    (
        "Wan",
        {"image_model": "wan2.1"},
        {
            "head.modulation": (1, 2, 1536),
            "head.head.weight": (64, 8),
            "blocks.0.ffn.0.weight": (8, 8),
            "patch_embedding.weight": (8, 16, 1, 2, 2),
        },
    ),
    ("HiDream", {"image_model": "hidream"}, {"caption_projection.0.linear.weight": (8, 8)}),
    (
        "Qwen-Image",
        {"image_model": "qwen_image"},
        {
            "txt_norm.weight": (3584,),
            "img_in.weight": (8, 64),
            "proj_out.weight": (64, 8),
            "transformer_blocks.0.img_mod.1.weight": (8, 8),
        },
    ),
    (
        "Stable Diffusion XL",
        {"adm_in_channels": 2816},
        {"input_blocks.0.0.weight": (320, 4, 3, 3), "label_emb.0.0.weight": (8, 2816)},
    ),
    (
        "Stable Diffusion",
        {"adm_in_channels": None, "model_channels": 320},
        {"input_blocks.0.0.weight": (320, 4, 3, 3)},
    ),
]
T5 = "encoder.block.0.layer.0.SelfAttention.k.weight"
TEXT_ENCODERS: list[tuple[str, str, dict[str, tuple[int, ...]]]] = [
    ("a text encoder (Qwen3-4B)", "QWEN3_4B", qwen3_shapes(width=2560)),
    ("a text encoder (Qwen3-8B)", "QWEN3_8B", qwen3_shapes(width=4096)),
    ("a text encoder (Qwen3-1.7B)", "QWEN3_2B", qwen3_shapes(width=2048)),
    ("a text encoder (Qwen3-0.6B)", "QWEN3_06B", qwen3_shapes(width=1024)),
    ("a text encoder (T5)", "T5_BASE", {T5: (768, 768)}),
    ("a text encoder (CLIP)", "CLIP_L", {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}),
    (
        "a text encoder (Llama)",
        "LLAMA3_8",
        {"model.layers.0.post_attention_layernorm.weight": (4096,)},
    ),
    (
        "a text encoder (Gemma)",
        "GEMMA_2_2B",
        {
            "model.layers.0.post_attention_layernorm.weight": (2304,),
            "model.layers.0.post_feedforward_layernorm.weight": (2304,),
        },
    ),
]


def on_meta(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("name", "wanted", "shapes"), TRANSFORMERS, ids=[t[0] for t in TRANSFORMERS]
)
def test_a_transformer_is_named_as_the_host_detects_it(host, name, wanted, shapes):
    from comfy import model_detection

    source = Path(model_detection.__file__).read_text("utf-8")
    if not all(str(word) in source for word in (*wanted, wanted.get("image_model", ""))):
        pytest.skip(f"ComfyUI {host.version} does not know {name}")
    found = model_detection.detect_unet_config(on_meta(shapes), "")
    assert {key: found.get(key) for key in wanted} == wanted
    assert family.describe(component(shapes).tensors) == name


@pytest.mark.parametrize(
    ("name", "wanted", "shapes"), TEXT_ENCODERS, ids=[t[0] for t in TEXT_ENCODERS]
)
def test_a_text_encoder_is_named_as_the_host_detects_it(host, name, wanted, shapes):
    assert host.sd.detect_te_model(on_meta(shapes)).name == wanted
    assert family.describe(component(shapes).tensors) == name


@pytest.mark.parametrize(
    ("down", "up"),
    [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")],
    ids=str,
)
def test_a_lora_is_one_for_the_host(host, down, up):
    from comfy import lora

    name = "lora_unet_layers_0_attention_out"
    tensors = {f"{name}.{down}": torch.zeros(4, 8), f"{name}.{up}": torch.zeros(8, 4)}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert list(lora.load_lora(tensors, {name: "weight"})) == ["weight"]
    assert family.describe(component(shapes).tensors) == "a LoRA"


@cache
def words_of_the_host() -> frozenset[str]:
    """Every name in the host's model code and loaders; numbers and generic endings aside."""
    import comfy.sd

    package = Path(comfy.sd.__file__).parent
    texts = [path.read_text("utf-8") for path in package.rglob("*.py")]
    return frozenset(word for text in texts for word in re.findall(r"[A-Za-z]\w*", text))


@pytest.mark.parametrize("row", family._SIGNATURES, ids=lambda row: f"{row[0]}: {row[1][0]}")
def test_every_word_of_a_signature_is_a_name_of_the_host(host, row):
    """Catches a misspelt signature, which would never match anything."""
    words = {w for part in row[1] for w in part.split(".") if not w.isdigit()} - {""}
    if row[0] == "Boogu-Image" and "double_stream_layers" not in words_of_the_host():
        pytest.skip(f"ComfyUI {host.version} does not know Boogu-Image")
    unknown = {w for w in words if not any(h == w or h.startswith(w) for h in words_of_the_host())}
    assert unknown == set()


def test_every_family_of_the_table_is_checked():
    """By the host's detection where it detects that family, by its names otherwise."""
    detected = {t[0] for t in TRANSFORMERS} | {t[0] for t in TEXT_ENCODERS} | {"a LoRA"}
    named_only = {name for name, _ in family._SIGNATURES} - detected
    assert named_only == {
        "a ControlNet",
        "a ControlNet for Z-Image",
        "a VAE",
        "a VAE (tiny)",
        "a VAE (video)",
        "Z-Image in names that ComfyUI does not load",
    }
