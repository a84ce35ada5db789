"""What the switches of the tutorial save on diffusers' own Z-Image at inference: live-bytes peaks.

    python run.py bench diffusers_peak [--case 1024x1024x1]

diffusers' transformer at full size on fake CUDA tensors in bfloat16, one call without gradients as
its pipeline makes it: as it comes, after `enable_gradient_checkpointing()`, and after the
pipeline's `enable_attention_slicing()` and `set_attention_slice("max")`. Weights, kernel workspaces
and the allocator's fragmentation are not in the figures; attention counts as flash-like. Rows of
other cases are kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from .rows import RESULTS_DIR, merged, write
from .shown import diffusers_peak as shown

RESULTS = RESULTS_DIR / "diffusers_peak.jsonl"
TEXT_TOKENS = 256
KEY = ("variant", "width_px", "height_px", "batch")
CASES = ((1024, 1024, 1), (512, 512, 4), (2048, 2048, 1))


def as_it_comes(pipeline: Any) -> None:
    """Nothing is switched on."""


def gradient_checkpointing(pipeline: Any) -> None:
    pipeline.transformer.enable_gradient_checkpointing()


def attention_slicing(pipeline: Any) -> None:
    pipeline.enable_attention_slicing()
    pipeline.set_attention_slice("max")


VARIANTS: dict[str, Callable[[Any], None]] = {
    "diffusers": as_it_comes,
    "enable_gradient_checkpointing()": gradient_checkpointing,
    'set_attention_slice("max")': attention_slicing,
}


def peak_bytes(switch: Callable[[Any], None], width_px: int, height_px: int, batch: int) -> int:
    """The peak of one call of a fresh transformer, in bytes, weights excluded."""
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from pack.testing.tracker import Tracker

    with FakeTensorMode(), torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)  # weights of fake tensors cannot be cast
        try:
            transformer = ZImageTransformer2DModel()
        finally:
            torch.set_default_dtype(default)
        pipeline = ZImagePipeline(None, None, None, None, transformer)
        switch(pipeline)
        latents = [
            torch.empty(16, 1, height_px // 8, width_px // 8, dtype=torch.bfloat16)
            for _ in range(batch)
        ]
        texts = [torch.empty(TEXT_TOKENS, 2560, dtype=torch.bfloat16) for _ in range(batch)]
        times = torch.empty(batch)
        with torch.inference_mode(), Tracker(attention="flash") as tracker:
            tracker.watch(*latents, *texts)
            transformer(latents, times, texts, return_dict=False)
    return tracker.peak_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["{}x{}x{}".format(*case) for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only these")
    options = parser.parse_args()
    chosen = [c for c, name in zip(CASES, names, strict=True) if name in (options.case or names)]
    import diffusers

    known = {"diffusers": diffusers.__version__, "torch": torch.__version__}
    rows = [
        {
            "variant": name, "width_px": width, "height_px": height, "batch": batch,
            "text_tokens": TEXT_TOKENS, "dtype": "bfloat16", "device": "fake cuda",
            "peak_bytes": peak_bytes(switch, width, height, batch), **known,
        }
        for width, height, batch in chosen
        for name, switch in VARIANTS.items()
    ]  # fmt: skip
    write(RESULTS, merged(RESULTS, rows, KEY))
    print(
        f"Live-bytes peak of one call of diffusers' Z-Image transformer at inference, bfloat16, "
        f"{TEXT_TOKENS} text tokens, weights excluded, fake tensors; diffusers "
        f"{known['diffusers']}, torch {known['torch']}."
    )
    print(f"\n{shown.tables(rows)['diffusers_peak']}", end="")


if __name__ == "__main__":
    main()
