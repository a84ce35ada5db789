"""Paired time of one full-width Z-Image block on the CPU: the host's own and ours, in turn.

    python run.py bench block_time [--pairs N] [--tokens N ...] [--variant NAME ...]

Random bfloat16 weights, SDPA attention, one thread. Each pair runs the host's block and ours one
after the other; the ratio of each pair is taken, then the median, since the machine's speed drifts.
The outputs are compared bit for bit. Rows measured before are kept.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .rows import RESULTS_DIR, merged, write
from .shown import block_time as shown

RESULTS = RESULTS_DIR / "block_time.jsonl"
# Columns: what is set on Apply Gradient Checkpoint.
VARIANTS: dict[str, dict[str, Any]] = {
    "speed": {"prefer": "speed"},
    "balance (default)": {},
    "3 groups (Slice auto)": {"groups": 3},
    "smallest": {"prefer": "smallest"},
}


def make_block(dtype: torch.dtype) -> Any:
    """One main block of the host with seeded random weights at Z-Image's widths."""
    import comfy.ldm.lumina.model as lumina
    import comfy.ops

    torch.manual_seed(0)
    settings = {"operations": comfy.ops.manual_cast, "device": "cpu", "dtype": dtype}
    block = lumina.JointTransformerBlock(
        0, 3840, 30, 30, 256, 8 / 3, 1e-5, True,
        z_image_modulation=True, operation_settings=settings,
    )  # fmt: skip
    for name, weight in block.named_parameters():
        noise = torch.randn(weight.shape) * (0.02 if weight.ndim > 1 else 0.1)
        weight.data = (noise + (1 if "norm" in name else 0)).to(dtype)
    return block.requires_grad_(False)


def lean(block: Any, name: str) -> Any:
    """The block as Apply Gradient Checkpoint puts it into a model, with that variant's choice."""
    from pack.nodes.denoiser.plan import DenoiserChoice
    from pack.nodes.denoiser.sizes import Z_IMAGE
    from pack.nodes.host.denoiser.block import BlockSettings, LeanBlock

    return LeanBlock(block, BlockSettings(Z_IMAGE, DenoiserChoice(**VARIANTS[name])))


def measure(
    tokens: int, pairs: int, dtype: torch.dtype, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of median ratio and seconds, one per variant."""
    from comfy.ldm.flux.layers import EmbedND

    block = make_block(dtype)
    variants = {name: lean(block, name) for name in names}
    x = torch.randn(1, tokens, 3840, dtype=dtype)
    embedder = EmbedND(dim=128, theta=256.0, axes_dim=[32, 48, 48])
    rope = embedder(torch.arange(tokens).float()[None, :, None].expand(1, tokens, 3)).movedim(1, 2)
    adaln = torch.randn(1, 256, dtype=dtype)
    rows = []
    with torch.inference_mode():
        expected = block(x, None, rope, adaln)
        for name, variant in variants.items():
            is_equal = torch.equal(variant(x, None, rope, adaln), expected)
            ratios, seconds = [], []
            for _ in range(pairs):
                start = time.perf_counter()
                block(x, None, rope, adaln)
                middle = time.perf_counter()
                variant(x, None, rope, adaln)
                seconds.append(middle - start)
                ratios.append((time.perf_counter() - middle) / seconds[-1])
            rows.append(
                {
                    "variant": name, "tokens": tokens, "pairs": pairs, "is_bit_equal": is_equal,
                    "ratio": statistics.median(ratios), "ratio_min": min(ratios),
                    "ratio_max": max(ratios), "stock_seconds": statistics.median(seconds),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    host_dir = os.environ["ZIMAGE_HOST_DIR"]
    with tempfile.TemporaryDirectory() as base_dir:
        sys.path.insert(0, host_dir)
        from comfy.cli_args import args

        args.cpu, args.base_directory, args.use_pytorch_cross_attention = True, base_dir, True
        rows = [
            row
            for tokens in options.tokens
            for row in measure(tokens, options.pairs, torch.bfloat16, options.variant)
        ]
    version = Path(host_dir, "comfyui_version.py").read_text().split('"')[1]
    known = {
        "host": version, "torch": torch.__version__, "dtype": "bfloat16",
        "device": f"cpu {platform.machine()}, 1 thread",
    }  # fmt: skip
    kept = merged(RESULTS, [{**row, **known} for row in rows], ("tokens", "variant"))
    rows = [row for row in kept if row["variant"] in VARIANTS]
    write(RESULTS, rows)
    print(
        "One full-width block, bfloat16, CPU, 1 thread; time as a multiple of the host's, median "
        f"of the pairs (min to max). ComfyUI {version}, torch {torch.__version__}."
    )
    print(f"\n{shown.tables(rows)['block_time']}", end="")


if __name__ == "__main__":
    main()
