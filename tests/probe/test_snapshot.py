"""What the VRAM Probe needs of the tracker, and the tracker against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.probe.tracker import PeakTracker
from pack.testing.tracker import Tracker
from torch import nn


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2) / 7).softmax(dim=-1)
        return x + self.out(scores @ v)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(48, 96), nn.Linear(96, 48), nn.Linear(48, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))


MODULES = {
    "linear": (lambda: nn.Linear(48, 32), (7, 48)),
    "attention": (Attention, (2, 9, 48)),
    "feed-forward": (Gated, (2, 9, 48)),
    "norms": (lambda: nn.Sequential(nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 5)), (3, 48)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2)
        ),
        (1, 3, 12, 10),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_equals_torchs_mem_tracker(name):
    mem_tracker: Any = pytest.importorskip("torch.distributed._tools.mem_tracker")
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = make(), torch.randn(*shape)
    with torch.no_grad():
        theirs = mem_tracker.MemTracker()
        theirs.track_external(module, x)
        with theirs:
            module(x)
        (snapshot,) = theirs.get_tracker_snapshot("peak").values()
        expected = next(value for key, value in snapshot.items() if "Total" in str(key))
        with Tracker() as ours:
            ours.watch(x, *module.parameters())
            module(x)
    assert ours.peak_bytes == expected
    assert expected > sum(p.nbytes for p in module.parameters()) + x.nbytes


def test_allocations_have_shape_and_dtype():
    with Tracker() as tracker:
        x = torch.zeros(2, 3, dtype=torch.bfloat16)
        x.view(6).float()
        tracker.watch(torch.ones(5))
    assert [(a.shape, a.dtype) for a in tracker.peak_live] == [
        ((2, 3), torch.bfloat16),
        ((6,), torch.float32),
    ]


def test_a_peak_that_is_begun_anew():
    with PeakTracker() as tracker:
        x = torch.zeros(100)
        del x
        tracker.restart_peak()
        assert (tracker.peak_bytes, tracker.peak_op, tracker.peak_live) == (0, "", ())
        y = torch.zeros(50)
        assert tracker.peak_bytes == 200
        tracker.restart_peak()
        assert tracker.peak_bytes == 200, "what is alive is where the next peak begins"
        assert [a.shape for a in tracker.peak_live] == [(50,)]
    del y


def test_only_one_kind_of_device_counts():
    with Tracker(device="cpu") as tracker:
        torch.zeros(10)
        torch.zeros(1000, device="meta")
        tracker.watch(torch.zeros(1000, device="meta"))
    assert tracker.peak_bytes == 40
