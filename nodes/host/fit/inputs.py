"""Reads the node's inputs: the sizes of the picture, the prompt and the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.memory_management as memory
import comfy.model_management as management
import comfy.text_encoders.llama as llama
from comfy.model_patcher import ModelPatcher

from ...denoiser.need import References, of_latent, with_references
from ...denoiser.sizes import Z_IMAGE, Request
from ...fit.planner import Planner
from ...fit.stages import Models, published_models
from ...fit.text_encoder import QWEN3_4B
from ...fit.what_fits import Run
from ...prefer import Prefer
from ...vae.devices import has_ram, is_unrolled
from ..base.device import is_dynamic
from ..denoiser.block import fill_on
from ..denoiser.known import activation_bytes, check_is_z_image, transformer_sizes
from ..denoiser.prefetch import can_prefetch
from ..vae.patch import decoder_sizes
from . import budget
from .text_encoder import (
    bytes_per_score,
    check_is_text_encoder,
    table_bytes,
    text_encoder_sizes,
    why_not_limited,
)

# Hosts after 0.30.0 write a text encoder block's result over its input.
ADDS_IN_PLACE = "output" in llama.TransformerBlock.forward.__code__.co_varnames


def models_here() -> Models:
    """The published models as this host runs them."""
    device = management.get_torch_device()
    return replace(
        published_models(),
        text_adds_in_place=ADDS_IN_PLACE,
        text_bytes_per_score=bytes_per_score(device, QWEN3_4B),
        is_dynamic=memory.aimdo_enabled,
        has_prefetch=can_prefetch(device),
        fill_tokens=fill_on(device, Z_IMAGE),
    )


def planner_for(
    model: ModelPatcher,
    asked: Request,
    *,
    named_bytes: int,
    prefer: Prefer,
    vae: Any,
    clip: Any,
    latent: dict[str, Any] | None,
    conditioning: Any,
) -> Planner:
    """The planner for the node's widgets and what is connected to it.

    Args:
        asked: the widgets' picture and batch, and the prompt's length to assume.
        named_bytes: the budget; 0 for what the card has free.
        vae: what is connected, or None.
        clip: likewise.
        latent: likewise; it overrides the widgets.
        conditioning: likewise; it overrides the prompt's length, and may have reference pictures.

    Raises:
        ValueError: the model or the CLIP is not Z-Image's, or the latent is not a picture's.
    """
    check_is_z_image(model)
    sizes = transformer_sizes(model)
    tokens = text_tokens(conditioning) or asked.text_tokens
    request = replace(asked, text_tokens=tokens, dtype_bytes=activation_bytes(model), sizes=sizes)
    if latent is not None:
        request = of_latent(request, shape_of(latent, sizes.channels))
    references = [references_of(entry[1]) for entry in conditioning or ()]
    request = with_references(request, references)
    models = replace(
        models_here(),
        denoiser=sizes,
        denoiser_weight_bytes=budget.weight_bytes(model),
        has_ram=has_ram(model.load_device),
        is_unrolled=is_unrolled(model.load_device),
        is_dynamic=is_dynamic(model),
        has_prefetch=can_prefetch(model.load_device),
        fill_tokens=fill_on(model.load_device, sizes),
    )
    is_text_here = True
    if clip is not None:
        check_is_text_encoder(clip)
        is_text_here = why_not_limited(clip, model.load_device) is None
        text = text_encoder_sizes(clip)
        models = replace(
            models,
            text=text,
            text_weight_bytes=budget.weight_bytes(clip.patcher),
            text_table_bytes=table_bytes(clip),
            text_bytes_per_score=bytes_per_score(model.load_device, text),
        )
    decoder = None if vae is None else decoder_sizes(vae)  # None: the VAE cannot be lean
    if vae is not None:
        models = replace(
            models,
            decoder=decoder or models.decoder,
            vae_dtype_bytes=vae.vae_dtype.itemsize,
            vae_weight_bytes=vae.patcher.model_size(),
        )
    return Planner(
        models,
        request,
        named_bytes,
        budget.margin_bytes(),
        prefer,
        floor_bytes=budget.floor_bytes(model),
        run=Run(
            has_text=is_text_here and (clip is not None or conditioning is None),
            has_clip=is_text_here and clip is not None,
            has_lean_vae=decoder is not None,
        ),
    )


def shape_of(latent: dict[str, Any], channels: int) -> tuple[int, ...]:
    """Shape [B, C, H, W] of the latent on a LATENT wire.

    Raises:
        ValueError: it is not an image latent with that many channels.
    """
    shape = tuple(latent["samples"].shape)
    if len(shape) == 5 and shape[2] == 1:  # a video latent of one frame
        shape = (*shape[:2], *shape[3:])
    if len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"latent must have {channels} channels and be a picture's, got shape {list(shape)}: "
            "use Empty SD3 Latent Image, or VAE Encode with Z-Image's VAE"
        )
    return shape


def text_tokens(conditioning: Any) -> int | None:
    """Length of the longest prompt on a CONDITIONING wire; None without one."""
    found = [entry[0].shape[1] for entry in conditioning or () if entry[0] is not None]
    return max(found, default=None)


def references_of(cond: Mapping[str, Any]) -> References:
    """The reference pictures of a prompt.

    Source: Lumina2.extra_conds in the host's comfy/model_base.py.
    """
    seen: list[Any] = [one for one in cond.get("clip_vision_outputs") or () if one is not None]
    return References(
        [tuple(one.shape) for one in cond.get("reference_latents") or ()],
        [one.shape[1] for one in cond.get("reference_latents_text_embeds") or ()],
        [one.last_hidden_state.shape[1] for one in seen],
    )
