"""True peaks and times of sampling on a CUDA card: the host alone and our nodes, in turn.

    python run.py bench denoiser_cuda [--mode estimate dynamic] [--case 2048x2048x1] [--card 6 8]
    python run.py bench denoiser_cuda --device cpu --layers 1 --case 128x128x1   # tries the script

Random bfloat16 weights of the true sizes: memory and time do not depend on their values, and the
result is checked to be finite. Each mode of the host runs in a process of its own: `estimate` loads
the model whole, `dynamic` is dynamic VRAM, switched on as the host's main.py does.
Peaks: torch's allocated bytes above those before the step, and reserved bytes. Times: CUDA events
around whole steps after two of warm-up, all variants in turn, round after round; the ratio is the
median over the rounds. Last, bfloat16 errors against float64 on few layers, 20 draws.
--card N leaves N GiB of the card free: the rest is allocated before the host starts.
Without a card nothing is measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __package__:
    from .load_ram import REPO, register_pack
else:
    from load_ram import REPO, register_pack

RESULTS = REPO / "benchmarks" / "results" / "denoiser_cuda.jsonl"
MIB = 2**20
TEXT_TOKENS = 256
CASES = ("1024x1024x1", "1024x1024x4", "512x512x4", "2048x2048x1", "2048x2048x4", "4096x4096x1")
WARM_UP, TIMED, ROUNDS, DRAWS = 2, 3, 3, 20
VARIANTS = {
    "stock": None, "Apply Gradient Checkpoint": "", "+ Attention Slice auto": "auto",
    "+ Attention Slice max": "max", "Fit to VRAM": "fit",
}  # fmt: skip


class Sampled(NamedTuple):
    """Seconds of one step, and bytes at the peak: above the step's start, and reserved."""

    step_s: float
    peak_bytes: int | None
    reserved_bytes: int | None


def settle(device: str, mode: str, base_dir: Path) -> torch.device:
    """Makes the host importable in the asked mode; returns its device."""
    sys.path.insert(0, os.environ["ZIMAGE_HOST_DIR"])
    from comfy.cli_args import args

    args.cpu, args.base_directory, args.disable_api_nodes = device == "cpu", str(base_dir), True
    args.use_pytorch_cross_attention = True
    if mode == "dynamic":
        import comfy_aimdo.control

        comfy_aimdo.control.init()
    import comfy.model_management

    if mode == "dynamic":
        import comfy.memory_management
        import comfy.model_patcher

        devices = [d.index for d in comfy.model_management.get_all_torch_devices()]
        headroom = int(getattr(args, "vram_headroom", 0) * 2**30)
        try:
            started = comfy_aimdo.control.init_devices([(index, headroom) for index in devices])
        except TypeError:  # comfy-aimdo 0.4.9
            started = comfy_aimdo.control.init_devices(devices)
        if not started:
            raise RuntimeError("dynamic VRAM could not be started on this machine")
        comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
        comfy.memory_management.aimdo_enabled = True
    return comfy.model_management.get_torch_device()


def make_ballast(card_gib: float) -> torch.Tensor:
    """Takes of the card what is beyond so many GiB."""
    free, _ = torch.cuda.mem_get_info()
    return torch.empty(max(0, free - int(card_gib * 2**30)), dtype=torch.uint8, device="cuda")


def make_model(device: torch.device, layers: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The host's ModelPatcher of Z-Image with seeded random weights in RAM."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    from pack.nodes.memory.shapes import TransformerSizes
    from pack.tests.host.stock_forward import unet_config

    config = comfy.supported_models.ZImage(unet_config(TransformerSizes(layers=layers)))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            weight.normal_(0, 0.02, generator=generator)
            if "norm" in name:
                weight.add_(1)
    model.requires_grad_(False)
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.CoreModelPatcher(model, load_device=device, offload_device=offload)


def patched(patcher: Any, slice_mode: str | None) -> Any:
    from pack.nodes.attention_slice import AttentionSlice
    from pack.nodes.fit_to_vram import FitToVRAM
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    if slice_mode is None:
        return patcher
    if slice_mode == "fit":
        return FitToVRAM.execute(patcher, prefer="speed").args[0]
    patcher = ApplyGradientCheckpoint.execute(patcher).args[0]
    return AttentionSlice.execute(patcher, slice_mode).args[0] if slice_mode else patcher


def sample(patcher: Any, case: tuple[int, int, int], device: torch.device) -> Sampled:
    """Samples a few steps as KSampler does; the first ones warm up."""
    import comfy.sample

    width, height, batch = case
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 16, height // 8, width // 8, generator=generator)
    text = torch.randn(1, TEXT_TOKENS, 2560, generator=generator)
    is_cuda = device.type == "cuda"
    marks: list[float] = []
    before = 0

    def after_step(step: int, *_: Any) -> None:
        nonlocal before
        if is_cuda:
            torch.cuda.synchronize(device)
        marks.append(time.perf_counter())
        if is_cuda and step + 1 == WARM_UP:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)

    with torch.inference_mode():
        out = comfy.sample.sample(
            patcher, noise, WARM_UP + TIMED, 1.0, "euler", "simple", [[text, {}]], [[text, {}]],
            torch.zeros_like(noise), seed=1, disable_pbar=True, callback=after_step,
        )  # fmt: skip
    if not out.isfinite().all():
        raise RuntimeError("the sampled latent is not finite")
    steps = [b - a for a, b in zip(marks[WARM_UP - 1 :], marks[WARM_UP:], strict=False)]
    peak = reserved = None
    if is_cuda:
        peak = torch.cuda.max_memory_allocated(device) - before
        reserved = torch.cuda.max_memory_reserved(device)
    return Sampled(statistics.median(steps), peak, reserved)


def measure(device: torch.device, layers: int, cases: list[str]) -> list[dict[str, Any]]:
    """Rows of every case and variant."""
    import gc

    import comfy.model_management

    model = make_model(device, layers)
    variants = {name: patched(model, mode) for name, mode in VARIANTS.items()}
    rows = []
    for text in cases:
        width, height, batch = (int(part) for part in text.split("x"))
        runs: dict[str, list[Sampled]] = {name: [] for name in variants}
        failed: dict[str, str] = {}
        for _ in range(ROUNDS):
            for name, patcher in variants.items():
                if name in failed:
                    continue
                gc.collect()
                comfy.model_management.soft_empty_cache()
                try:
                    runs[name].append(sample(patcher, (width, height, batch), device))
                except torch.OutOfMemoryError:
                    failed[name] = "out of memory"
        for name, found in runs.items():
            row = {"case": text, "variant": name, "rounds": len(found), "failed": failed.get(name)}
            if found:
                pairs = zip(found, runs["stock"], strict=False)
                ratios = [ours.step_s / stock.step_s for ours, stock in pairs]
                row |= {
                    "step_s": statistics.median(run.step_s for run in found),
                    "ratio": statistics.median(ratios) if ratios else None,
                    "peak_bytes": found[-1].peak_bytes,
                    "reserved_bytes": found[-1].reserved_bytes,
                }
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def errors(device: torch.device) -> dict[str, Any]:
    """Relative errors of bfloat16 against float64, host and ours: medians and maxima of draws."""
    import copy

    import comfy.model_management

    stock = make_model(device, layers=2)
    ours = patched(stock, "")
    comfy.model_management.load_models_gpu([stock])
    denoiser = stock.model.diffusion_model
    precise = copy.deepcopy(denoiser).to(device, torch.float64)
    found: dict[str, list[float]] = {"stock": [], "Apply Gradient Checkpoint": []}
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 16, 64, 64, generator=generator).to(device)
        text = torch.randn(1, TEXT_TOKENS, 2560, generator=generator).to(device)
        t = torch.rand(1, generator=generator).to(device)
        with torch.inference_mode():
            wanted = precise(x.double(), t.double(), text.double(), TEXT_TOKENS)
            half = (x.bfloat16(), t, text.bfloat16(), TEXT_TOKENS)
            for name, patcher in zip(found, (stock, ours), strict=True):
                comfy.model_management.load_models_gpu([patcher])
                options = patcher.model_options["transformer_options"]
                got = patcher.model.diffusion_model(*half, transformer_options=dict(options))
                found[name].append(((got.double() - wanted).norm() / wanted.norm()).item())
    return {
        "case": "bfloat16 against float64, 512x512, 2 main layers", "draws": DRAWS,
        **{f"{name} median": statistics.median(values) for name, values in found.items()},
        **{f"{name} largest": max(values) for name, values in found.items()},
    }  # fmt: skip


def child(options: argparse.Namespace) -> None:
    """Measures one mode and prints its rows as JSON lines."""
    register_pack()
    with tempfile.TemporaryDirectory() as base_dir:
        ballast = make_ballast(options.card[0]) if options.card else None
        device = settle(options.device, options.child, Path(base_dir))
        import comfyui_version

        rows = measure(device, options.layers, options.case)
        if options.child == "estimate":
            rows.append(errors(device))
        name, backend = str(device), None
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            backend = torch.cuda.get_allocator_backend()
        known = {
            "mode": options.child, "layers": options.layers, "dtype": "bfloat16", "device": name,
            "allocator": backend, "card_gib": options.card[0] if ballast is not None else None,
            "host": comfyui_version.__version__, "torch": torch.__version__,
        }  # fmt: skip
        for row in rows:
            print(json.dumps({**row, **known}))


def table(rows: list[dict[str, Any]]) -> str:
    """Peak, reserved, time of each case and variant."""
    lines = ["| case | variant | peak | reserved | step | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        if "variant" not in row:
            continue
        if row["failed"]:
            cells = [row["failed"], "", "", ""]
        else:
            sizes = [row["peak_bytes"], row["reserved_bytes"]]
            cells = [f"{n / MIB:.0f} MiB" if n is not None else "not measured" for n in sizes]
            cells += [f"{row['step_s']:.3f} s", f"{row['ratio']:.3f}" if row["ratio"] else ""]
        lines.append(f"| {row['case']} | {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--mode", nargs="+", choices=["estimate", "dynamic"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--case", nargs="+", default=list(CASES), help="WIDTHxHEIGHTxBATCH")
    parser.add_argument("--card", nargs="+", type=float, help="GiB of it that are left free")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("denoiser_cuda: not measured, torch sees no CUDA device here")
        return 0
    if options.child:
        child(options)
        return 0
    modes = options.mode or (["estimate", "dynamic"] if options.device == "cuda" else ["estimate"])
    rows, failed = [], 0
    for mode, card in itertools.product(modes, options.card or [None]):
        command = [sys.executable, "-m", "benchmarks.denoiser_cuda", "--child", mode]
        command += [] if card is None else ["--card", str(card)]
        command += ["--device", options.device, "--layers", str(options.layers), "--case"]
        result = subprocess.run([*command, *options.case], stdout=subprocess.PIPE, cwd=REPO)
        failed += result.returncode != 0
        lines = result.stdout.decode().splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        rows += found
        if found:
            known = found[0]
            left = "" if card is None else f", {card:g} GiB left free"
            print(
                f"\n{mode}: {known['device']}{left}, allocator {known['allocator']}, bfloat16, "
                f"{known['layers']} main layers, {TEXT_TOKENS} text tokens; ComfyUI "
                f"{known['host']}, torch {known['torch']}\n\n{table(found)}"
            )
        for row in found:
            if "draws" in row:
                print("\n" + json.dumps(row))
    if options.device == "cuda" and rows:  # a trial on the CPU is no result
        RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
