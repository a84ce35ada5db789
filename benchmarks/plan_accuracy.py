"""The planner's formulas against fake tensors: predicted over measured peak, over random requests.

    python run.py bench plan_accuracy [--stage denoise] [--cases 20] [--seed 1] [--show]

No weights and no GPU are needed: the host's own classes, and ours in them, run on fake tensors of a
card, and the storages alive are counted exactly. Pictures have sides from 256 to 4096 in steps of
16, prompts 1 to 512 tokens; batches, settings and types are drawn too. Encoded prompts go to 4096
tokens in even steps, with bfloat16 weights and in float32 as the host encodes; attention keeps
scores in every other. Lean VAE runs in bfloat16 only. A case is drawn from its stage, seed and
number, so a list that grows stays the same. ControlNets have their published sizes; bfloat16. Rows
measured before are kept; the time to plan is measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .rows import RESULTS_DIR, cell_of, merged, versions, write
from .shown import plan_accuracy as shown
from .shown.plan_accuracy import PLANNING

RESULTS = RESULTS_DIR / "plan_accuracy.jsonl"
# Cases by stage: more than 300 in all.
CASES = {
    "text encode": 60, "denoise": 81, "denoise, stock": 60, "ControlNet": 16,
    "ControlNet, stock": 16, "references": 24, "references, stock": 16, "VAE": 40,
    "VAE, stock": 60,
}  # fmt: skip
GROUPS, CHUNKS = (0, 0, 0, 1, 2, 3, 6, 30), (0, 0, 0, 256, 512, 1024, 2048)
NETS = ("union", "union 2.0", "union 2.1", "lite")
PREFERENCES = ("speed", "balance", "smallest")
KERNELS = ("math", "efficient")
BATCHES = (1, 1, 1, 1, 2, 3, 4, 8)
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Requests in more parts take minutes on fake tensors: another is drawn.
LARGEST_PIECES = 600
KEY = ("stage", "seed", "number")


def drawn(stage: str, seed: int, number: int) -> dict[str, Any]:
    """One request and the settings for it."""
    chance = random.Random(f"{stage} {seed} {number}")
    while pieces(case := _drawn(chance, stage, number)) > LARGEST_PIECES:
        pass
    return case


def pieces(case: dict[str, Any]) -> int:
    """Into how many parts our nodes cut the work, about."""
    if "groups" not in case:
        return 0
    rows, groups = (320, 15) if case["prefer"] == "smallest" else (1024, 1)
    rows, groups = case["chunk_tokens"] or rows, case["groups"] or groups
    pictures = case["batch"] * (1 + case.get("references", 0))
    return groups * pictures * -(-case["width_px"] * case["height_px"] // 256 // rows)


def _drawn(chance: random.Random, stage: str, number: int) -> dict[str, Any]:
    # Most pictures are small, where padding and the fixed parts show, and which are soon measured.
    longest = chance.choice((1024, 1024, 1536, 4096))
    case: dict[str, Any] = {
        "width_px": 16 * chance.randint(16, longest // 16),
        "height_px": 16 * chance.randint(16, longest // 16),
        "batch": chance.choice(BATCHES),
        "text_tokens": chance.randint(1, 512),
        "dtype": chance.choice(("bfloat16", "bfloat16", "float16", "float32")),
    }
    if stage == "text encode":
        tokens = number * 4096 // (CASES[stage] - 1) or 1
        return {"text_tokens": tokens, "dtype": "float32", "attention": KERNELS[number % 2]}
    if stage.startswith("references"):
        case["references"] = chance.randint(1, 3)
    if stage in ("denoise", "references"):
        case |= {"groups": chance.choice(GROUPS), "chunk_tokens": chance.choice(CHUNKS)}
        case["prefer"] = chance.choice(PREFERENCES)
    if stage.startswith("ControlNet"):
        case |= {"net": chance.choice(NETS), "dtype": "bfloat16"}
    if stage == "ControlNet":
        case |= {"groups": 0, "chunk_tokens": 0, "prefer": chance.choice(("speed", "balance"))}
    if stage.startswith("VAE"):
        del case["text_tokens"]
        case["is_decode"] = chance.random() < 0.6
    if stage == "VAE":
        case["dtype"] = "bfloat16"
        case["prefer"] = chance.choice(PREFERENCES)
        case["batch"] = chance.choice((1, 1, 2))
    return case


class Measures:
    """Predicted and measured peaks; the fake models are made once."""

    def __init__(self) -> None:
        self._denoisers: dict[tuple[str, int], Any] = {}
        self._vaes: dict[tuple[bool, torch.dtype], Any] = {}
        self._encoder: Any = None

    def __call__(self, stage: str, case: dict[str, Any]) -> tuple[int, int]:
        """Bytes predicted and bytes measured."""
        if stage == "text encode":
            return self._text(case)
        if stage.startswith("ControlNet"):
            return self._controlled(case)
        if stage.startswith(("denoise", "references")):
            return self._denoise(case)
        return self._vae(case)

    def _text(self, case: dict[str, Any]) -> tuple[int, int]:
        from pack.nodes.fit.text_encoder import FUSED_SCORE, MATH_SCORE, text_encoder_peak_bytes
        from pack.testing.fake_text_encoder import FakeTextEncoder

        self._encoder = self._encoder or FakeTextEncoder()
        tokens, kernel = case["text_tokens"], case["attention"]
        held = MATH_SCORE if kernel == "math" else FUSED_SCORE
        measured = self._encoder.measure(tokens, attention=kernel).peak_bytes
        return text_encoder_peak_bytes(tokens, bytes_per_score=held), measured

    def _denoise(self, case: dict[str, Any]) -> tuple[int, int]:
        from pack.nodes.denoiser.need import References, with_references
        from pack.nodes.denoiser.peak import lean_peak_bytes, stock_peak_bytes
        from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
        from pack.nodes.denoiser.sizes import Request
        from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

        dtype = TYPES[case["dtype"]]
        # Lean blocks peak alike; the host's own may peak in the second block of a kind.
        denoiser = self._denoiser(case["dtype"], 1 if "groups" in case else 2)
        shape = [case[name] for name in ("width_px", "height_px", "batch", "text_tokens")]
        request = Request(*shape, dtype.itemsize)
        # As large as the picture, and without texts.
        references = References([request.latent_shape] * case.get("references", 0))
        request = with_references(request, [references])
        if "groups" not in case:
            return stock_peak_bytes(request), denoiser.measure(request).peak_bytes
        groups, chunk = case["groups"], case["chunk_tokens"]
        prefer = case["prefer"]
        patched = ApplyGradientCheckpoint.execute(denoiser.patcher(), "all", chunk, groups, prefer)
        plan = denoiser_plan(request, DenoiserChoice(prefer, groups, chunk))
        measured = denoiser.measure(request, patcher=patched.args[0])
        return lean_peak_bytes(request, plan), measured.peak_bytes

    def _denoiser(self, dtype: str, layers: int) -> Any:
        from pack.nodes.denoiser.sizes import Z_IMAGE
        from pack.testing.stock_forward import FakeDenoiser

        if (dtype, layers) not in self._denoisers:
            sizes = dataclasses.replace(Z_IMAGE, layers=layers, refiner_layers=layers)
            self._denoisers[dtype, layers] = FakeDenoiser(sizes, dtype=TYPES[dtype])
        return self._denoisers[dtype, layers]

    def _controlled(self, case: dict[str, Any]) -> tuple[int, int]:
        from pack.nodes.denoiser.peak import lean_peak_bytes, stock_peak_bytes
        from pack.nodes.denoiser.plan import DenoiserChoice, denoiser_plan
        from pack.nodes.denoiser.sizes import Request
        from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint
        from pack.testing.control_models import fake_controlled, net_sizes

        denoiser, net = self._denoiser(case["dtype"], 2), case["net"]
        shape = [case[name] for name in ("width_px", "height_px", "batch", "text_tokens")]
        request = Request(*shape, has_patches=True, controls=(net_sizes(net),))
        patcher, predicted = denoiser.patcher(), stock_peak_bytes(request)
        if "prefer" in case:
            choice = DenoiserChoice(case["prefer"])
            patcher = ApplyGradientCheckpoint.execute(patcher, "all", 0, 0, choice.prefer).args[0]
            predicted = lean_peak_bytes(request, denoiser_plan(request, choice))
        with fake_controlled(denoiser, patcher, request, net) as patched:
            return predicted, denoiser.measure(request, patcher=patched).peak_bytes

    def _vae(self, case: dict[str, Any]) -> tuple[int, int]:
        from pack.nodes.vae.peak import vae_peak_bytes
        from pack.testing.vae_models import FakeVae

        is_decode, dtype = case["is_decode"], TYPES[case["dtype"]]
        if (is_decode, dtype) not in self._vaes:
            self._vaes[is_decode, dtype] = FakeVae(is_decoder=is_decode, dtype=dtype)
        fake = self._vaes[is_decode, dtype]
        height, width, batch = (case[name] for name in ("height_px", "width_px", "batch"))
        plan = None
        if "prefer" in case:
            tracker, _, plan = fake.measure(height, width, case["prefer"], batch=batch)
        else:
            tracker = fake.stock(height, width, batch=batch)
        return vae_peak_bytes(fake.call(height, width), batch, plan), tracker.peak_bytes


def kept_rows(*new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the results file, and the new ones, which replace those of their case."""
    return sorted(merged(RESULTS, new, KEY), key=lambda row: cell_of(row, KEY))


def planning_seconds(repeat: int = 20) -> float:
    """The longest of some plans that do not fit, with what else would fit."""
    from pack.nodes.denoiser.sizes import Request
    from pack.nodes.fit.stages import published_models
    from pack.nodes.fit.what_fits import Run, alternatives, fit

    models, longest = published_models(), 0.0
    for _ in range(repeat):
        start = time.thread_time()
        plan = fit(models, Request(4096, 4096, 8), 2 * 2**30, run=Run(has_encode=True))
        found = list(alternatives(plan))
        longest = max(longest, time.thread_time() - start)
        assert plan.verdict != "fits" and found
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", action="append", choices=list(CASES))
    parser.add_argument("--cases", type=int, help="of each stage, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="also those measured before")
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    options = parser.parse_args()

    from pack.testing.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        known = versions()
        measure: Callable[[str, dict[str, Any]], tuple[int, int]] = Measures()
        done = set() if options.again else {cell_of(row, KEY) for row in kept_rows()}
        for stage in () if options.show else options.stage or CASES:
            for number in range(options.cases or CASES[stage]):
                if (stage, options.seed, number) in done:
                    continue
                case, start = drawn(stage, options.seed, number), time.perf_counter()
                predicted, measured = measure(stage, case)
                row = {
                    "stage": stage, "seed": options.seed, "number": number, **case,
                    "predicted_bytes": predicted, "measured_bytes": measured,
                    "device": "fake cuda", "seconds": round(time.perf_counter() - start, 1),
                    **known,
                }  # fmt: skip
                write(RESULTS, kept_rows(row))
                print(f"{stage} {number}: {predicted / measured:.4f} {case}", file=sys.stderr)
        if not options.show:
            plan = {"stage": PLANNING, "seed": 0, "number": 0, "plan_seconds": planning_seconds()}
            write(RESULTS, kept_rows({**plan, "device": "cpu, 1 thread", **known}))
    print(
        "Peak of live bytes as the planner's formulas have it, over that on fake tensors of a "
        f"card. ComfyUI {known['host']}, torch {known['torch']}."
    )
    for table in shown.tables(kept_rows()).values():
        print(f"\n{table}", end="")


if __name__ == "__main__":
    main()
