"""The bytes to reserve for a decode or encode, weights excluded."""

from __future__ import annotations

from ..units import MIB

# For the workspaces of convolutions, what torch's allocator keeps beyond live bytes, and the scores
# of attention that is not fused. Not measured on a card.
VAE_RESERVED, SPARE_BYTES = 1.5, 64 * MIB


def vae_need_bytes(peak_bytes: int) -> int:
    """Bytes to reserve for a decode or encode with that peak of live bytes."""
    return int(VAE_RESERVED * peak_bytes) + SPARE_BYTES
