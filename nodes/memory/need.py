"""What a host shall reckon with for a call: the formula's live bytes and what comes on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .plan import denoiser_plan, lean_peak_bytes
from .shapes import PIXELS_PER_LATENT, Request

MIB = 2**20
# Text length that is reckoned with where the prompt is not known.
TEXT_TOKENS = 512
# What torch's allocator reserves over the live bytes of the denoiser (simulated: 1.1 to 1.7).
DENOISER_RESERVED = 1.7
# The same for convolutions, with their workspaces, and what attention holds that is not fused. Not
# measured on a card.
VAE_RESERVED, SPARE_BYTES = 1.5, 64 * MIB


def denoiser_need_bytes(request: Request, groups: int, chunk_tokens: int = 0) -> int:
    """Bytes that one call of the lean denoiser may take, weights excluded.

    The lean blocks under the host's own forward need most: three streams and two rope tables more.
    """
    plan = denoiser_plan(request, groups=groups, chunk_tokens=chunk_tokens)
    live = lean_peak_bytes(request, plan) + 3 * request.stream_bytes + 2 * request.rope_bytes
    return int(DENOISER_RESERVED * live)


def vae_need_bytes(peak_bytes: int) -> int:
    """Bytes that a decode or encode with that peak of live bytes may take, weights excluded."""
    return int(VAE_RESERVED * peak_bytes) + SPARE_BYTES


def of_latent(request: Request, latent_shape: Sequence[int]) -> Request:
    """The request for a latent [B, C, H, W]."""
    height, width = (side * PIXELS_PER_LATENT for side in latent_shape[-2:])
    return replace(request, width_px=width, height_px=height, batch=latent_shape[0])
