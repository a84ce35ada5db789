"""Units of bytes, and how a count of bytes is shown."""

from __future__ import annotations

MIB = 2**20
GIB = 2**30
# In which ComfyUI's dynamic VRAM holds weights on the card. Source: comfy_aimdo's ModelVBAR.
PAGE_BYTES = 32 * MIB


def size(count: int | None) -> str:
    """Bytes as a person reads them: 1.25 GiB, 87.4 MiB."""
    if count is None:
        return "not available"
    if abs(count) >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB"
