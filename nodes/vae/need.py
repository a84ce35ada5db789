"""What a decode or encode needs beside the weights: live bytes and what comes on top."""

from __future__ import annotations

from ..units import MIB

# What torch's allocator reserves over the live bytes of convolutions, with their workspaces, and
# what attention holds that is not fused. Not measured on a card.
VAE_RESERVED, SPARE_BYTES = 1.5, 64 * MIB


def vae_need_bytes(peak_bytes: int) -> int:
    """Bytes that a decode or encode with that peak of live bytes may take, weights excluded."""
    return int(VAE_RESERVED * peak_bytes) + SPARE_BYTES
