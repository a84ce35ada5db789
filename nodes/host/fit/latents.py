"""Sizes that the wires of a graph tell: of latents and of prompts."""

from __future__ import annotations

from typing import Any


def shape_of(latent: dict[str, Any], channels: int) -> tuple[int, ...]:
    """Shape [B, C, H, W] of what travels on a LATENT wire.

    Raises:
        ValueError: it is no image latent with that many channels.
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
