"""How many kernels a stretch of work launches, by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

COUNTS = ("kernels", "copies", "operations")


@contextmanager
def counted(device: torch.device, figures: dict[str, Any]) -> Iterator[None]:
    """Counts kernels and copies while it is open, and puts them into the figures of a row.

    kernels: launched on the card, copies and fills apart; None without a card.
    copies: on the card, fills included; None without a card.
    operations: of torch on the CPU, nested ones too; None with a card.

    Raises:
        RuntimeError: the profiler saw nothing on the card (CUPTI is missing).
    """
    from torch.profiler import ProfilerActivity, profile

    figures |= dict.fromkeys(COUNTS)
    is_card = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_card else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as seen:
        yield
        if is_card:
            torch.cuda.synchronize(device)
    events = seen.events()
    if not is_card:
        figures["operations"] = len(events)
        return
    on_card = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    if not on_card:
        raise RuntimeError("torch's profiler saw no kernel: is CUPTI installed?")
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in on_card)
    figures |= {"kernels": len(on_card) - copies, "copies": copies}
