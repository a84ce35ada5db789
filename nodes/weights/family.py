"""Finds which model a weight file holds by the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .blocks import count_blocks, extent
from .component import Component
from .header import TensorInfo, WeightsError
from .quantised import quantised_layers
from .text_encoder import key_prefix, qwen3_config, size_name

# The first row of which one tensor name contains every part names the file. The names are those
# that the host's own detection looks for, and diffusers' names of the same tensors.
_SIGNATURES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA", (".lora_A.",)),
    ("a LoRA", (".lora_down.",)),
    ("a LoRA", ("lora_unet_",)),
    ("a ControlNet", ("control_model.",)),
    ("a ControlNet", ("controlnet_",)),
    ("a ControlNet for Z-Image", ("control_layers.",)),
    ("NewBie", ("clip_text_pooled_proj.0.weight",)),
    ("Z-Image in names that ComfyUI does not load", ("noise_refiner.0.adaLN_modulation.0.",)),
    ("Boogu-Image", ("double_stream_layers.0.img_instruct_attn.",)),
    ("OmniGen 2", ("ref_image_patch_embedder.",)),
    ("Lumina 2", ("noise_refiner.0.", "norm")),
    ("Chroma", ("distilled_guidance_layer.",)),
    ("Flux 2", ("double_stream_modulation_img.",)),
    ("Hunyuan Video", ("txt_in.individual_token_refiner.",)),
    ("Flux", ("double_blocks.0.img_attn.norm.",)),
    ("Flux", ("single_transformer_blocks.0.attn.norm_k.weight",)),
    ("Stable Diffusion 3", ("joint_blocks.0.context_block.",)),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.1.weight",)),
    ("LTX-Video", ("patchify_proj.weight",)),
    ("AuraFlow", ("double_layers.0.attn.w1q.weight",)),
    ("HiDream", ("caption_projection.0.linear.weight",)),
    ("Wan", ("head.modulation",)),
    ("Cosmos", ("blocks.0.adaln_modulation_self_attn.1.weight",)),
    ("PixArt", ("adaln_single.",)),
    ("PixArt", ("t_block.1.weight",)),
    ("Mochi", ("t5_yproj.weight",)),
    ("Hunyuan DiT", ("mlp_t5.0.weight",)),
    ("Stable Diffusion XL", ("label_emb.0.0.weight",)),
    ("Stable Diffusion", ("input_blocks.0.0.weight",)),
    ("Stable Diffusion", ("down_blocks.0.", "attentions")),
    ("a text encoder (Gemma)", ("layers.0.post_feedforward_layernorm.weight",)),
    ("a text encoder (T5)", ("encoder.block.0.layer.0.SelfAttention.",)),
    ("a text encoder (CLIP)", ("text_model.encoder.layers.0.",)),
    ("a text encoder (Llama)", ("layers.0.post_attention_layernorm.weight",)),
    ("a VAE (video)", ("decoder.middle.0.residual.0.gamma",)),
    ("a VAE", ("decoder.conv_in.weight",)),
    ("a VAE (tiny)", ("taesd_decoder.1.weight",)),
)
# What the host takes away in front of a transformer's tensor names.
_PREFIXES = ("model.diffusion_model.", "model.model.", "net.", "model.")
_VARIANTS = ("turbo", "edit", "omni", "base")
_FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class ZImage:
    """What a Z-Image transformer's tensors say about it.

    name: such as "Z-Image-Turbo"; plain "Z-Image" where the variant is unknown.
    dim: width of the residual stream, in channels.
    layers: main layers.
    text_width: width of the text encoder it reads, in channels.
    latent_channels: channels of the latent it denoises.
    prefix: what the host takes away in front of the tensor names.
    is_diffusers: named as diffusers names the tensors.
    """

    name: str
    dim: int
    layers: int
    text_width: int
    latent_channels: int
    prefix: str
    is_diffusers: bool


def describe(tensors: Mapping[str, TensorInfo]) -> str:
    """Names the model family that tensor names look like, such as "Flux" or "a VAE"."""
    prefix = _z_image_prefix(tensors)
    if prefix is not None:
        if f"{prefix}dec_net.cond_embed.weight" in tensors:
            return "Z-Image in pixel space"
        # Ming-Image is the same class: nothing learned to pad with, or a mark of newer hosts.
        is_padded = f"{prefix}cap_pad_token" in tensors
        is_ming = f"{prefix}__ming_image__" in tensors or not is_padded
        return "Ming-Image" if is_ming else "Z-Image"
    prefix = key_prefix(tensors)
    if prefix is not None:
        shape = tensors[f"{prefix}layers.0.post_attention_layernorm.weight"].shape
        return f"a text encoder ({size_name(shape[0])})" if shape else "a text encoder"
    for family, parts in _SIGNATURES:
        if any(all(part in name for part in parts) for name in tensors):
            return family
    return f"a model of unknown kind ({len(tensors)} tensors, {min(tensors, default='none')} ...)"


def z_image(component: Component, hint: str = "") -> ZImage:
    """Checks that a component is a Z-Image transformer and reads its sizes.

    Args:
        hint: text that may name the variant, such as the folder's name and pipeline class; Turbo,
            Base and Edit have the same tensors.

    Raises:
        WeightsError: another model, of which the message names the family; or scales that ComfyUI
            would drop.
    """
    tensors = component.tensors
    prefix = _z_image_prefix(tensors)
    family = describe(tensors)
    if prefix is None or family != "Z-Image":
        raise WeightsError(
            f"{component.label} is not Z-Image: it looks like {family}: choose "
            "z_image_turbo_bf16.safetensors or a folder of Z-Image-Turbo"
        )
    is_diffusers = f"{prefix}noise_refiner.0.attention.to_q.weight" in tensors
    embed = "all_x_embedder.2-1.weight" if is_diffusers else "x_embedder.weight"

    # The host loses the scales of the layers that it renames or fuses, the attention's among them.
    # Files in which only the others are quantised are not known, and are refused too.
    if quantised_layers(component, prefix) and is_diffusers:
        raise WeightsError(
            f"{component.label} holds quantised weights with diffusers' tensor names, for which "
            "ComfyUI drops the scales: choose the plain weights and a weight_dtype, or a file "
            "quantised for ComfyUI"
        )
    for stack in ("noise_refiner.", "context_refiner.", "layers."):
        layers = count_blocks(component.label, tensors, f"{prefix}{stack}")

    def size(name: str, axis: int = 0) -> int:
        return extent(component.label, tensors, f"{prefix}{name}", axis)

    patch_width = size(embed, 1)
    if tensors[f"{prefix}{embed}"].dtype not in _FLOATS:
        patch_width = 64  # packed: its shape is another one
    has_siglip = any("siglip_embedder" in n for n in tensors)
    return ZImage(
        name=_variant_name(f"{component.label} {hint}", has_siglip),
        dim=size("cap_embedder.1.weight"),
        layers=layers,
        text_width=size("cap_embedder.0.weight"),
        latent_channels=patch_width // 4,  # patches of 2 x 2
        prefix=prefix,
        is_diffusers=is_diffusers,
    )


def check_text_encoder(component: Component, *, text_width: int) -> dict[str, Any]:
    """Checks that a component is the text encoder that a Z-Image of that text width reads.

    Returns:
        Its sizes, as `qwen3_config` gives them.

    Raises:
        WeightsError: no Qwen3, another width, incomplete, or scales that ComfyUI would drop.
    """
    if key_prefix(component.tensors) is None:
        raise WeightsError(
            f"{component.label} is not the text encoder of Z-Image: it looks like "
            f"{describe(component.tensors)}: choose qwen_3_4b.safetensors"
        )
    quantised_layers(component)  # raises where scales would be lost
    config = qwen3_config(component)
    width = config["hidden_size"]
    if width != text_width:
        raise WeightsError(
            f"{component.label} is {size_name(width)}, {width} channels wide, this Z-Image reads "
            f"{text_width} channels ({size_name(text_width)}): choose a text encoder of that width"
        )
    return config


def check_vae(component: Component, *, latent_channels: int) -> None:
    """Checks that a component is an image VAE with that many latent channels.

    Raises:
        WeightsError: no VAE, a video VAE, or another number of channels.
    """
    tensors = component.tensors
    first = tensors.get("decoder.conv_in.weight", tensors.get("taesd_decoder.1.weight"))
    if first is None or len(first.shape) != 4:
        family = "a VAE (video)" if first is not None else describe(tensors)
        raise WeightsError(
            f"{component.label} is not the VAE of Z-Image: it looks like {family}: choose "
            "ae.safetensors"
        )
    found = first.shape[1] * (4 if "bn.running_mean" in tensors else 1)
    if found != latent_channels:
        raise WeightsError(
            f"{component.label} has {found} latent channels, Z-Image needs {latent_channels}: "
            "choose ae.safetensors (the VAE of Flux)"
        )


def _z_image_prefix(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The prefix of the tensor names of a Z-Image transformer; None where it is no Z-Image."""
    for prefix in ("", *_PREFIXES):
        # Lumina 2 is the same class with another modulation (its adaLN_modulation is numbered 1).
        names = ("cap_embedder.1.weight", "noise_refiner.0.adaLN_modulation.0.weight")
        if all(f"{prefix}{name}" in tensors for name in names):
            return prefix
    return None


def _variant_name(text: str, has_siglip: bool) -> str:
    if has_siglip:
        return "Z-Image-Omni"
    words = re.split(r"[^a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", text).lower())
    variant = next((variant for variant in _VARIANTS if variant in words), None)
    return f"Z-Image-{variant.capitalize()}" if variant else "Z-Image"
