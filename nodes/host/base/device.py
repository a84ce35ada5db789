"""Which models the host has loaded on a card, and what they and torch's allocator hold there."""

from __future__ import annotations

import functools
from typing import Any

import comfy.memory_management as memory
import comfy.model_management as management
import torch


def is_card(device: torch.device) -> bool:
    """Whether the device is a card that reports its memory; a DirectML card does not."""
    return device.type in ("cuda", "xpu")


@functools.cache
def multiprocessors(device: torch.device) -> int | None:
    """Multiprocessors of a card; None where torch does not say."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(device).multi_processor_count


def models_on(device: torch.device) -> list[Any]:
    """The patchers of the models on a device, the last used first."""
    # The host keeps the place of a model that was deleted.
    patchers = [p for p in management.loaded_models() if p is not None]
    return [p for p in patchers if p.load_device == device]


def weights_bytes(device: torch.device) -> int:
    """Bytes of model weights that the host has loaded on the device."""
    return sum(patcher.loaded_size() for patcher in models_on(device))


def is_dynamic(patcher: Any) -> bool:
    """Whether the host keeps a model's weights in pages that it can evict (dynamic VRAM)."""
    return hasattr(patcher, "is_dynamic") and patcher.is_dynamic()


def resident_page_bytes(patcher: Any) -> int:
    """Bytes of one model's weights in pages of dynamic VRAM."""
    if not is_dynamic(patcher):
        return 0
    return max(0, patcher.loaded_size() - patcher.model.model_loaded_weight_memory)


def _page_bytes(device: torch.device) -> int:
    return sum(map(resident_page_bytes, models_on(device)))


def allocator_weights_bytes(device: torch.device) -> int:
    """Bytes of weights on the device outside of pages, which torch's allocator counts."""
    return weights_bytes(device) - _page_bytes(device)


def may_stream(device: torch.device) -> bool:
    """Whether weights of a model on the device may come through copy buffers."""
    return any(is_dynamic(p) and p.loaded_size() < p.model_size() for p in models_on(device))


def copy_buffer_bytes(device: torch.device) -> int:
    """Bytes of buffers on a device through which dynamic VRAM streams weights without a page."""
    if not memory.aimdo_enabled:
        return 0
    buffers: dict[Any, Any] = getattr(management, "STREAM_AIMDO_CAST_BUFFERS", {})
    return sum(one.size() for one in buffers.values() if one.device == device.index)


def driver_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes in use on a card, and of them those that are neither torch's nor dynamic VRAM's.

    The latter are the driver's contexts and what other programs hold.

    Raises:
        RuntimeError, AssertionError: the driver does not answer.
    """
    free, total = getattr(torch, device.type).mem_get_info(device)
    own = allocator_bytes(device, "reserved_bytes")[0]
    own += _page_bytes(device) + copy_buffer_bytes(device)
    return total - free, max(0, total - free - own)


def allocator_bytes(device: torch.device, kind: str = "allocated_bytes") -> tuple[int, int]:
    """Current and highest bytes in torch's allocator of a card; zeros before its first use.

    kind: allocated_bytes or reserved_bytes.
    """
    module = torch.cuda.memory if device.type == "cuda" else torch.xpu.memory
    nested = getattr(module, "memory_stats_as_nested_dict", None)
    stats = nested(device) if nested is not None else {}
    if stats:
        return stats[kind]["all"]["current"], stats[kind]["all"]["peak"]
    flat = getattr(torch, device.type).memory_stats(device)
    return flat.get(f"{kind}.all.current", 0), flat.get(f"{kind}.all.peak", 0)
