"""What the host's models may take of a card, kept to by the host's own memory manager."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import torch

_COPY_BYTES, _COPIES = 64 * 2**20, 3


def room_bytes(device: torch.device) -> int | None:
    """What is free on the card with none of the host's models on it; None where there is no card.

    What other processes hold is not in it.
    """
    if device.type in ("cpu", "meta", "mps"):
        return None
    loaded = sum(p.loaded_size() for p in management.loaded_models() if p.load_device == device)
    return int(management.get_free_memory(device) + loaded)


def card_bytes(device: torch.device) -> int | None:
    """The size of the card; None where there is no card."""
    return None if device.type == "cpu" else int(management.get_total_memory(device))


def margin_bytes() -> int:
    """What the host itself leaves free for other programs."""
    return int(management.extra_reserved_memory())


def fence_bytes(device: torch.device, budget_bytes: int | None) -> int:
    """What of the card lies beyond the budget, less the margin that the host adds by itself.

    Told to the host on top of a need, it makes it keep its weights within the budget.
    """
    room = room_bytes(device)
    if room is None or budget_bytes is None:
        return 0
    return max(0, room - budget_bytes - margin_bytes())


def make_room(patcher: Any, need_bytes: int, budget_bytes: int | None) -> None:
    """Frees the weights of other models, so that this one and its need stay within the budget.

    Where weights lie in pages the host leaves the other models' until the card itself is full.
    """
    device = patcher.load_device
    room = room_bytes(device)
    if room is None or budget_bytes is None:
        return
    mine = [m for m in management.current_loaded_models if _is_of(m.model, patcher)]
    loaded = sum(m.model.loaded_size() for m in mine)
    wanted = need_bytes + max(0, room - budget_bytes) + max(0, patcher.model_size() - loaded)
    management.free_memory(min(wanted, room - loaded), device, mine)


def _is_of(loaded: Any, patcher: Any) -> bool:
    return loaded is not None and loaded.is_clone(patcher)


@contextmanager
def reserved(patcher: Any, latent_shape: Any, reserve_bytes: int) -> Iterator[None]:
    """The host's estimate for a latent of that shape is the reserve, for as long as it plans."""
    base = patcher.model
    factor = base.memory_usage_factor
    estimate = base.memory_required(list(latent_shape))
    base.memory_usage_factor = factor * reserve_bytes / max(estimate, 1)
    try:
        yield
    finally:
        base.memory_usage_factor = factor


def limit_pages(patcher: Any, limit_bytes: int | None) -> Callable[[], None] | None:
    """Bounds the pages of a model's weights on the card, and gives what lifts the bound.

    Returns:
        None where there are no pages to bound: on hosts that load by estimate, and on the CPU.

    Source: ModelVBAR in comfy_aimdo; its watermark is the first page that is never resident, while
    its watermark *limit* is what others may not take. The host lifts it whenever it loads.
    """
    pages = getattr(patcher.model, "dynamic_vbars", {}).get(patcher.load_device)
    if limit_bytes is None or not hasattr(pages, "set_watermark"):
        return None
    pages.set_watermark(limit_bytes)
    return lambda: pages.set_watermark(pages.max_size)


def enforcement(patcher: Any) -> str:
    """How a budget is kept to for this model, for a reader."""
    if room_bytes(patcher.load_device) is None:
        return "nothing is enforced: the model runs without a GPU"
    if getattr(patcher, "is_dynamic", bool)():
        return "enforced by the limit of the model's pages (dynamic VRAM)"
    return "enforced by the memory that the host is told to keep free (loading by estimate)"


def copy_bytes_per_s(device: torch.device) -> float | None:
    """Measured speed of a copy from pinned RAM to the card; None without an NVIDIA or AMD card."""
    return _copy_bytes_per_s(device.index or 0) if device.type == "cuda" else None


@functools.lru_cache
def _copy_bytes_per_s(index: int) -> float:
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=f"cuda:{index}")
    best = float("inf")
    for _ in range(_COPIES):
        torch.cuda.synchronize(index)
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(index)
        best = min(best, time.perf_counter() - start)
    return _COPY_BYTES / best


def patch_bytes(patcher: Any) -> int:
    """Bytes of the LoRA weights on a model, which come to the card with the weights they change."""
    seen: dict[int, int] = {}

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        else:
            walk(getattr(value, "weights", ()) or ())

    for entries in patcher.patches.values():
        for entry in entries:
            # strength of the patch, the patch, and strength of the model: see add_patches
            if len(entry) > 1 and not isinstance(entry[1], str | int | float):
                walk(entry[1])
    return sum(seen.values())
