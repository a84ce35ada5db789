"""VRAM Probe against counters that are read outside of it, and what it costs per step.

The probe resets torch's peak counter between steps, so the outside figures come from elsewhere: the
allocated peak of the same sampling without a probe right before, and the card's memory as the
driver sees it, sampled from a thread while the probe watches.
"""

from __future__ import annotations

from typing import Any

import torch

from ..driver import DriverPeak
from ..host import Host, start
from ..job import Job, Picture
from ..rows import Recorder
from ..sampling import Sampled, sample

DETAILS = ("totals", "steps", "blocks")
PICTURE, REHEARSED = Picture(1024, 1024), Picture(64, 64)
STEPS, ROUNDS = 4, 3
# What only a card's allocator counts; None in a rehearsal.
ON_A_CARD = (
    "probe_peak_bytes", "probe_activations_bytes", "parts_sum_bytes", "pages_bytes",
    "outside_activations_bytes", "outside_peak_bytes", "ratio",
)  # fmt: skip


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    picture, steps, rounds = (REHEARSED, 2, 1) if job.is_rehearsal else (PICTURE, STEPS, ROUNDS)
    model = host.load("whole").model
    sample(host, model, picture, steps=1)  # the first sampling of a process pays for the kernels
    for index in range(rounds):
        for detail in DETAILS:
            if rows.has(str(picture), detail, index):
                continue
            host.settle()
            with rows.attempt(str(picture), detail, index) as figures:
                figures |= compared(host, model, picture, steps, detail)


def compared(host: Host, model: Any, picture: Picture, steps: int, detail: str) -> dict[str, Any]:
    """One sampling without a probe, one behind it: peaks and seconds of both."""
    # The driver's sampler runs beside both, so that its cost is not the probe's.
    with DriverPeak(before_bytes=0) as driver:
        plain = sample(host, model, picture, steps=steps)
        pages = pages_bytes(model)
        driver.restart()
        watched, record = probed(host, model, picture, steps, detail)
    parts = record["parts_at_peak"]
    seconds, plain_seconds = (found.figures()["step_s"] for found in (watched, plain))
    figures = dict.fromkeys(ON_A_CARD)
    activations, allocated = (plain.memory[name] for name in ("peak_bytes", "allocated_bytes"))
    if activations and allocated:
        figures |= {
            "probe_peak_bytes": record["peak_bytes"],
            "probe_activations_bytes": parts["activations"],
            "parts_sum_bytes": sum(parts.values()),
            "pages_bytes": pages,
            "outside_activations_bytes": activations,
            "outside_peak_bytes": allocated + pages,
            "ratio": parts["activations"] / activations,
        }
    return {
        **figures,
        "driver_peak_bytes": driver.bytes,
        "measured_with": record["measured_with"],
        "note": "; ".join(record["notes"]) or None,
        "step_s": seconds,
        "plain_step_s": plain_seconds,
        "cost": seconds / plain_seconds - 1,
        "is_bit_equal": bool(torch.equal(watched.latent, plain.latent)),
    }


def pages_bytes(model: Any) -> int:
    """Weights in the pages of dynamic VRAM, as the host's patcher counts them."""
    return max(0, model.loaded_size() - model.model.model_loaded_weight_memory)


def probed(
    host: Host, model: Any, picture: Picture, steps: int, detail: str
) -> tuple[Sampled, dict[str, Any]]:
    """One sampling behind VRAM Probe, and the record that it leaves on the node."""
    from pack.nodes.vram_probe import VRAMProbe

    with torch.inference_mode():
        out = VRAMProbe.execute(model, detail=detail)
    watched = sample(host, out.args[0], picture, steps=steps)
    record = out.ui["z_image_vram_probe"][0]
    if record["state"] != "done":
        raise RuntimeError(f"the probe's record must be done, it is {record['state']}")
    return watched, record
