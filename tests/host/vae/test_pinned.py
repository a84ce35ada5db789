"""Pinned RAM goes back to the system."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_keeps_nothing_of_what_was_pinned(host: Any) -> None:
    from pack.nodes.host.vae.pinned import PinnedRam

    def held() -> int:
        return torch.cuda.host_memory_stats()["allocated_bytes.current"]

    card, before = torch.device("cuda", torch.cuda.current_device()), held()
    with PinnedRam(card) as ram:
        ram.is_used = True
        rows = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
        copied = rows.to(card, non_blocking=True)
        del rows
        assert held() >= before + 2**26
    assert held() <= before
    assert copied.shape == (2**26,)
