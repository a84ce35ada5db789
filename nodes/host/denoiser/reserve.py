"""What ComfyUI reserves for a call of a model whose blocks run in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.ldm.lumina.model as lumina
from comfy.model_patcher import ModelPatcher

from ...denoiser.families import (
    FamilyRequest,
    FamilySizes,
    family_peak_bytes,
    family_stock_bytes,
)
from ...denoiser.need import denoiser_reserve_bytes, of_latent
from ...denoiser.sizes import Request
from ..base.reserve import reserved
from .block import BlockSettings
from .controlnet import control_sizes
from .controls import has_controls
from .known import names_of_blocks, published_family
from .replaced import OF_ATTENTION


def reserve(model: ModelPatcher, request: Request, settings: BlockSettings) -> Callable | None:
    """A PREPARE_SAMPLING wrapper with which ComfyUI reserves less; None where that is not known.

    Args:
        request: with the model's sizes.
    """
    family = published_family(model, request.sizes)
    if family is not None:
        copies = request.dtype_bytes * _largest_block(model.model)
        return _reserve_share(family, settings, request.dtype_bytes, copies)
    if type(model.model.diffusion_model) is lumina.NextDiT:
        return _reserve_need(request, settings)
    return None


def _reserve_need(request: Request, settings: BlockSettings) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper: ComfyUI plans with our need instead of its own estimate."""

    def prepare(executor, model, noise_shape, *args, **kwargs):
        if len(noise_shape) != 4:  # frames: the host's own estimate counts them
            return executor(model, noise_shape, *args, **kwargs)
        estimate = model.model.memory_required(list(noise_shape))
        options = (kwargs.get("model_options") or {}).get("transformer_options", {})
        latent = replace(of_latent(request, noise_shape), controls=control_sizes(options))
        plan = settings.plan_for(latent.batch, latent.lengths, model.load_device)
        need = denoiser_reserve_bytes(latent, plan)
        with reserved(model, estimate, need):
            return executor(model, noise_shape, *args, **kwargs)

    return prepare


def _largest_block(model: Any) -> int:
    """Weights of the block with the most."""
    blocks = map(model.get_submodule, names_of_blocks(model.diffusion_model))
    return max(sum(weight.numel() for weight in block.parameters()) for block in blocks)


def _reserve_share(
    family: FamilySizes, settings: BlockSettings, dtype_bytes: int, copies_bytes: int
) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper: of ComfyUI's own estimate, the share that our blocks hold.

    The estimate is two to three times what ComfyUI's own blocks hold, and counts reference
    pictures. So its share leaves room for kernels.

    Args:
        copies_bytes: what a block holds of its weights where they are streamed or cast.
    """

    def prepare(executor, model, noise_shape, conds, *args, **kwargs):
        options = (kwargs.get("model_options") or {}).get("transformer_options", {})
        is_patched = any(options.get("patches", {}).get(kind) for kind in OF_ATTENTION)
        request = FamilyRequest.of_latent(family, noise_shape, dtype_bytes)
        # Then blocks of ComfyUI run: the model's, or those of a ControlNet.
        if request is None or is_patched or has_controls(model, conds):
            return executor(model, noise_shape, conds, *args, **kwargs)
        plan = settings.plan_for(request.batch, (request.tokens,), model.load_device, options)
        share = family_peak_bytes(request, plan) / family_stock_bytes(request)
        estimate = model.model.memory_required(list(noise_shape))
        with reserved(model, estimate, int(share * estimate) + copies_bytes):
            return executor(model, noise_shape, conds, *args, **kwargs)

    return prepare
