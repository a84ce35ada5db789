"""Room on the card for one call: unloads other models, and tells the host what to reserve."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .device import is_card, models_on


def make_room(used: Sequence[Any], bytes_for_it: int, budget_bytes: int | None) -> None:
    """Moves weights of other models to RAM, until the rest and this call fit the budget.

    With dynamic VRAM the host keeps the other models' weights until the card itself is full.

    Args:
        used: the model that runs and those loaded with it; their weights stay.
        bytes_for_it: what the call takes, weights included.
        budget_bytes: for the call and all other models; None for no limit.
    """
    device = used[0].load_device
    if budget_bytes is None or not is_card(device):
        return
    others = [p for p in models_on(device) if not any(p.is_clone(one) for one in used)]
    excess = sum(p.loaded_size() for p in others) - max(0, budget_bytes - bytes_for_it)
    for other in reversed(others):  # the least recently used first
        if excess > 0:
            excess -= other.partially_unload(other.offload_device, excess)


@contextmanager
def reserved(patcher: Any, estimate_bytes: float, reserve_bytes: int) -> Iterator[None]:
    """While it is open, ComfyUI plans with `reserve_bytes` instead of its own estimate."""
    base = patcher.model
    factor = base.memory_usage_factor
    base.memory_usage_factor = factor * min(1.0, reserve_bytes / max(estimate_bytes, 1))
    try:
        yield
    finally:
        base.memory_usage_factor = factor
