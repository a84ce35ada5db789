"""What each kind of device gets."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.vae.devices import has_norm_parts, has_ram, is_unrolled, layout, why_stock

LAST, PLAIN = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize(
    ("device", "hip", "has_library", "stays_stock", "format_", "unrolls"),
    [
        ("cpu", None, True, (False, False), LAST, False),
        ("cuda", None, True, (False, False), LAST, False),
        ("cuda", None, False, (False, False), PLAIN, True),
        ("cuda", "7.0", True, (False, False), PLAIN, False),
        ("cuda", "7.0", False, (False, False), PLAIN, True),
        ("mps", None, True, (True, False), PLAIN, False),
        ("xpu", None, True, (True, True), PLAIN, False),
        ("privateuseone", None, True, (True, True), PLAIN, False),
    ],
    ids=["CPU", "NVIDIA", "no cuDNN", "AMD", "no MIOpen", "Apple", "Intel", "DirectML"],
)
def test_each_device_gets_what_is_known_to_work(
    monkeypatch: pytest.MonkeyPatch, device: str, hip: str | None, has_library: bool,
    stays_stock: tuple[bool, bool], format_: torch.memory_format, unrolls: bool,
) -> None:  # fmt: skip
    """A bfloat16 decode ended the process on Apple; AMD got a layout that MIOpen does not have."""
    monkeypatch.setattr(torch.version, "hip", hip)
    there = torch.device(device)
    with torch.backends.cudnn.flags(enabled=has_library):
        reasons = [why_stock(there, dtype) for dtype in (torch.bfloat16, torch.float32)]
        assert tuple(reason is not None for reason in reasons) == stays_stock
        assert layout(there) == format_
        assert is_unrolled(there) == unrolls
        assert has_ram(there) == has_norm_parts(there) == (device == "cuda")
