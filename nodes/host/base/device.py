"""The models that the host has loaded, and the cards on which they may lie."""

from __future__ import annotations

from typing import Any

import comfy.model_management as management
import torch


def is_card(device: torch.device) -> bool:
    """Whether it is a card that tells its memory; a DirectML card does not."""
    return device.type in ("cuda", "xpu")


def models_on(device: torch.device) -> list[Any]:
    """The patchers of the models on a device, the last used first."""
    # The host keeps the place of a model that was deleted.
    patchers = [p for p in management.loaded_models() if p is not None]
    return [p for p in patchers if p.load_device == device]


def weights_bytes(device: torch.device) -> int:
    """Bytes of model weights that the host has loaded on the device."""
    return sum(patcher.loaded_size() for patcher in models_on(device))


def is_dynamic(patcher: Any) -> bool:
    """Whether a model's weights lie in pages that yield (dynamic VRAM)."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()
