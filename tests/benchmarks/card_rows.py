"""Invented rows of a campaign on a card."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pack.benchmarks.card import report, tables

GIB, MIB = 2**30, 2**20
FACTS = {
    "run": "r1", "rehearsal": False, "weights": "random", "card_gib": None, "device": "Card A",
    "card_bytes": 80 * GIB, "driver": "580.1", "allocator": "cudaMallocAsync", "torch": "2.11.0",
    "system": "Linux", "mode": "dynamic VRAM", "attention": "attention_pytorch",
    "dtype": "bfloat16", "comfyui": "0.30.0", "comfy_aimdo": "0.4.11", "comfy_kitchen": "0.2.26",
    "pack": "0.1.0 4ef9b7b",
}  # fmt: skip
OURS, FIT = report.DENOISER_OURS, report.BUDGET_OURS
Row = dict[str, Any]


def row(part: str, case: str, variant: str, round_: int = 0, **figures: Any) -> Row:
    named = {"part": part, "leg": "dynamic VRAM", "case": case, "variant": variant}
    return {**FACTS, **named, "round": round_, "error": None, **figures}


def step(variant: str, round_: int = 0, *, mib: float, s: float, **more: Any) -> Row:
    figures = {"peak_bytes": int(mib * MIB), "step_s": s, **more}
    return row("denoiser", figures.pop("case", "1024x1024x1"), variant, round_, **figures)


def whole(variant: str, round_: int = 1, *, gib: float | None, s: float | None, **more: Any) -> Row:
    card_gib = more.get("card_gib")
    figures = {
        "leg": "the card as it is" if card_gib is None else f"{card_gib:g} GiB",
        "peak_bytes": None if gib is None else int(gib * GIB), "seconds": s, "survived": True,
        **more,
    }  # fmt: skip
    return row("budget", figures.pop("case", "1024x1024x1"), variant, round_, **figures)


def ended(part: str, leg: str, how: str, **figures: Any) -> Row:
    """The campaign's own row of a leg; it knows no device."""
    named = {"part": part, "leg": leg, "run": "r1", "rehearsal": False, "case": "leg"}
    return {**named, "variant": how, "round": 0, "error": None, **figures}


def fill(folder: Path, found: Iterable[Row], name: str = "rows.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in found))
    return folder


def campaign() -> list[Row]:
    """Rows of every part, with an error, an imitated card that ComfyUI does not survive, a cut."""
    sizes = {"512x512x1": 0.5, "1024x1024x1": 1.0, "2048x2048x1": 4.0}
    found = [
        row("sanity", "node", OURS, is_bit_equal=True, relative_error=1e-3,
            host_relative_error=1e-3, largest_error=2e-3, reference="float64", seconds=0.2),
        row("sanity", "start", "allocator", counted_bytes=255 * MIB, expected_bytes=256 * MIB),
    ]  # fmt: skip
    for case, scale in sizes.items():
        for index in range(3):
            drift = 1 + 0.1 * index
            found.append(
                step(tables.HOST, index, mib=480 * scale, s=0.2 * drift * scale, case=case)
            )
            found.append(step(OURS, index, mib=90 * scale, s=0.3 * drift * scale, case=case))
        for name, weights in ((tables.HOST, 12.3), (OURS, 11.9)):
            held = int((weights + scale) * GIB)
            estimate = {"leg": "loading by estimate", "mode": "loading by estimate", "case": case}
            found.append(step(name, mib=480, s=0.2, allocated_bytes=held, **estimate))
        for name, extra in ((tables.HOST, 4.0), (FIT, 1.0), (f"{FIT} smallest", 0.6)):
            found += [
                whole(name, index, gib=13 + extra * scale, s=9.0 - index, case=case,
                      is_equal=name == tables.HOST, equal_8bit=0.997, most_off_8bit=2)
                for index in (0, 1)
            ]  # fmt: skip
    found += [
        whole(FIT, gib=99.0, s=99.0, case="1024x1024x1 with VRAM Probes"),
        step(tables.HOST, mib=99, s=9.0, case="1024x1024x1 fp8"),
        whole(tables.HOST, 0, gib=None, s=None, card_gib=4.0, survived=False,
              error="out of memory"),
        whole(FIT, 0, gib=3.7, s=14.0, card_gib=4.0),
        whole(FIT, 1, gib=3.8, s=11.0, card_gib=4.0),
        row("denoiser", "1024x1024x1 launches", tables.HOST, kernels=750, copies=3),
        row("denoiser", "1024x1024x1 launches", OURS, kernels=16620, copies=9),
        row("vae", "decode 1024x1024x1", tables.HOST, peak_bytes=1296 * MIB, seconds=0.1),
        row("vae", "decode 1024x1024x1", "Lean VAE speed", peak_bytes=603 * MIB, seconds=0.09,
            largest_error=1e-3, equal_8bit=0.99, most_off_8bit=1, psnr_db=70.0, seam_energy=1.01),
        row("predicted", "denoise 1024x1024x1", OURS, predicted_bytes=90 * MIB,
            measured_bytes=91 * MIB, ratio=90 / 91),
        row("predicted", "256x256x1 narrow model", OURS, step_s=0.1, kernels=6344),
        row("predicted", "constants", "A_NEW_ONE", value=1.0, samples=1),
        row("predicted", "constants", "DENOISER_RESERVED", value=1.4, low=1.2, high=1.6,
            today=1.7, samples=12),
        row("probe", "1024x1024x1", "steps", probe_peak_bytes=12 * GIB, ratio=1.01, cost=0.004),
        row("tutorial", "1024x1024x1", tables.HOST, peak_bytes=24 * GIB, seconds=5.0),
        row("training", "512x512x1", "ComfyUI, depth 1", peak_bytes=20 * GIB, step_s=3.0),
        row("training", "512x512x1", "ComfyUI, depth 2", peak_bytes=10 * GIB, step_s=3.0),
        row("training", "512x512x1", OURS, peak_bytes=10 * GIB, step_s=2.7, seconds=5.0, loss=0.5),
        ended("denoiser", "dynamic VRAM", "ended", seconds=200.0),
        ended("training", "all", "failed", seconds=9.0, error="RuntimeError: no"),
    ]  # fmt: skip
    return found
