"""Bytes kept for the backward pass in training, by way of checkpointing, at Z-Image's true sizes.

    python run.py bench training_memory [--side PX] [--layers N]

One forward and backward of the host's transformer on fake CPU tensors in bfloat16, frozen weights
(as for a LoRA), gradients to the latent, sub-quadratic attention replaced by SDPA. "Depth" is the
host's Train LoRA setting: 1 checkpoints the model as a whole, 2 its blocks. Rows of other sizes are
kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .rows import RESULTS_DIR, merged, write
from .shown import training_memory as shown

RESULTS = RESULTS_DIR / "training_memory.jsonl"
TEXT_TOKENS = 256
KEY = ("way", "width_px", "height_px", "layers")


class Kept(NamedTuple):
    """Live bytes after the forward, output aside, and the peak of forward and backward."""

    kept_bytes: int
    peak_bytes: int


@contextmanager
def host_checkpointing(denoiser: Any, depth: int) -> Iterator[None]:
    """As the host's Train LoRA node switches it on; depth 0 leaves it off."""
    from comfy_extras.nodes_train import find_modules_at_depth, patch, unpatch

    modules = find_modules_at_depth(denoiser, depth=depth) if depth else []
    for module in modules:
        patch(module)
    try:
        yield
    finally:
        for module in modules:
            unpatch(module)


def measure(depth: int, is_ours: bool, *, side_px: int, layers: int) -> Kept:
    """One forward and backward on a fresh model."""
    import comfy.model_management
    from pack.nodes.denoiser.sizes import Z_IMAGE, Request
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint
    from pack.testing import stock_forward
    from pack.testing.tracker import Tracker

    sizes = dataclasses.replace(Z_IMAGE, layers=layers)
    fake = stock_forward.FakeDenoiser(sizes, device="cpu")
    patcher = fake.patcher()
    if is_ours:
        patcher = ApplyGradientCheckpoint.execute(patcher).args[0]
    denoiser = fake.model.diffusion_model.requires_grad_(False)
    request = Request(side_px, side_px, text_tokens=TEXT_TOKENS)
    comfy.model_management.in_training = True
    try:
        with (
            stock_forward.installed(patcher) as options,
            host_checkpointing(denoiser, depth),
            fake.mode,
        ):
            latent = torch.empty(request.latent_shape, dtype=torch.bfloat16, requires_grad=True)
            text = torch.empty(1, TEXT_TOKENS, 2560, dtype=torch.bfloat16)
            with Tracker(attention="flash") as tracker:
                out = denoiser(
                    latent, torch.empty(1), text, TEXT_TOKENS, transformer_options=options
                )
                kept = tracker.current_bytes - out.untyped_storage().nbytes()
                out.sum().backward()
        return Kept(kept, tracker.peak_bytes)
    finally:
        comfy.model_management.in_training = False


WAYS = {
    "no checkpointing": (0, False),
    "the host's, depth 1 (whole model)": (1, False),
    "the host's, depth 2 (blocks)": (2, False),
    "Apply Gradient Checkpoint": (0, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--layers", type=int, default=30, help="main layers")
    options = parser.parse_args()
    side, layers = options.side, options.layers
    from pack.testing.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        import comfyui_version

        found = {name: measure(*way, side_px=side, layers=layers) for name, way in WAYS.items()}
        host = comfyui_version.__version__
    facts = {
        "width_px": side, "height_px": side, "batch": 1, "text_tokens": TEXT_TOKENS,
        "layers": layers, "dtype": "bfloat16", "device": "fake cpu", "host": host,
        "torch": torch.__version__,
    }  # fmt: skip
    rows = [{"way": name, **kept._asdict(), **facts} for name, kept in found.items()]
    write(RESULTS, merged(RESULTS, rows, KEY))
    print(
        f"Forward and backward at {side}x{side}, batch 1, {TEXT_TOKENS} text tokens, {layers} main "
        f"layers, frozen weights, bfloat16, fake CPU tensors; ComfyUI {host}, torch "
        f"{torch.__version__}.\n\n{shown.tables(rows)['training_memory']}",
        end="",
    )


if __name__ == "__main__":
    main()
