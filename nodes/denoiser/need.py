"""What a host shall reckon with for a call: the formula's live bytes and what comes on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .plan import denoiser_plan, lean_peak_bytes
from .sizes import PIXELS_PER_LATENT, Request

# Text length that is reckoned with where the prompt is not known.
TEXT_TOKENS = 512
# What torch's allocator reserves over the live bytes of the denoiser (simulated: 1.1 to 1.7).
DENOISER_RESERVED = 1.7


def denoiser_need_bytes(
    request: Request, groups: int, chunk_tokens: int = 0, *, is_plain: bool = False
) -> int:
    """Bytes that one call of the lean denoiser may take, weights excluded.

    A request that is not known to be plain may get lean blocks under the host's own forward, which
    holds at most three streams and two rope tables more.
    """
    return int(DENOISER_RESERVED * denoiser_live_bytes(request, groups, chunk_tokens, is_plain))


def denoiser_live_bytes(
    request: Request, groups: int, chunk_tokens: int = 0, is_plain: bool = True
) -> int:
    """The live bytes at the peak of such a call; of one that is not plain, at most."""
    plan = denoiser_plan(request, groups=groups, chunk_tokens=chunk_tokens)
    around = 0 if is_plain else 3 * request.stream_bytes + 2 * request.rope_bytes
    return lean_peak_bytes(request, plan) + around


def of_latent(request: Request, latent_shape: Sequence[int]) -> Request:
    """The request for a latent [B, C, H, W]."""
    height, width = (side * PIXELS_PER_LATENT for side in latent_shape[-2:])
    return replace(request, width_px=width, height_px=height, batch=latent_shape[0])
