"""Room on the card for one call: what the host plans with, and what others give up for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .device import is_card, models_on


def make_room(used: Sequence[Any], bytes_for_it: int, budget_bytes: int | None) -> None:
    """Sends weights of other models to RAM, until those that stay leave so much of the budget.

    Where weights lie in pages the host leaves the other models' until the card itself is full.

    Args:
        used: the model that runs and those that are loaded with it, which stay.
        bytes_for_it: what it takes with its weights.
        budget_bytes: of that and the other models; None for no limit.
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
    """The host reckons with the reserve instead of that estimate of its own, while it plans."""
    base = patcher.model
    factor = base.memory_usage_factor
    base.memory_usage_factor = factor * min(1.0, reserve_bytes / max(estimate_bytes, 1))
    try:
        yield
    finally:
        base.memory_usage_factor = factor
