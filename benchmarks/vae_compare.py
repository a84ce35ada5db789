"""One real decode on the CPU, in four ways: time, error, PSNR, seams, and pictures of the error.

    python run.py bench vae_compare [--side 512] [--tile 256] [--pairs 1]

The host's AutoencodingEngine at the widths of Flux and Z-Image with seeded random weights, float32,
one thread. Each pair runs all ways one after the other, and the ratios to the stock decode of the
same pair are taken; of several the median. Errors are against the stock decode. Seams: mean square
of the error within 4 pixels of the tiles' or strips' edges over that elsewhere; 1 is no seam.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__:
    from .denoiser_peak import register_pack, versions
else:
    from denoiser_peak import register_pack, versions

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
STOCK, TILED = "stock", "VAEDecodeTiled"
NEAR_PX = 4


def seam_ratio(error: torch.Tensor, edges: list[int], *, both: bool) -> float | None:
    """Mean square of the error [H, W, 3] near the edges over that elsewhere; None without edges."""
    square = error.square().mean(-1)
    near = torch.zeros_like(square, dtype=torch.bool)
    for edge in edges:
        near[max(0, edge - NEAR_PX) : edge + NEAR_PX] = True
        if both:
            near[:, max(0, edge - NEAR_PX) : edge + NEAR_PX] = True
    if not near.any() or near.all() or not square.any():
        return None
    return float(square[near].mean() / square[~near].mean())


def keep_map(error: torch.Tensor, path: Path) -> None:
    """Keeps the largest error of each pixel as a grey picture; white is the map's own maximum."""
    from PIL import Image

    grey = error.abs().amax(-1)
    scaled = (255 * grey / grey.max().clamp(min=1e-12)).round()
    Image.fromarray(scaled.numpy().astype(np.uint8)).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--tile", type=int, default=256, help="of VAEDecodeTiled, in pixels")
    parser.add_argument("--pairs", type=int, default=1)
    options = parser.parse_args()

    register_pack()
    from pack.tests.host.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        from pack.tests.host.vae_models import engine_vae, lean

        torch.set_num_threads(1)
        vae = engine_vae()
        tile = options.tile // 8
        tiling = {"tile_x": tile, "tile_y": tile, "overlap": tile // 8}
        ways: dict[str, Any] = {
            STOCK: vae.decode,
            TILED: lambda latent: vae.decode_tiled(latent, **tiling),
            **{p: lean(vae, p).decode for p in ("speed", "balance", "smallest")},
        }
        torch.manual_seed(0)
        latent = torch.randn(1, 16, options.side // 8, options.side // 8)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        made: dict[str, torch.Tensor] = {}
        with torch.inference_mode():
            for pair in range(options.pairs):
                for name, decode in ways.items():
                    start = time.perf_counter()
                    made[name] = decode(latent)[0]
                    seconds[name].append(time.perf_counter() - start)
                    print(f"pair {pair}, {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
        known = versions()
    rows = [_row(name, made, seconds, options, {**known, "pairs": options.pairs}) for name in ways]
    (RESULTS / "vae_compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"| {options.side}x{options.side}, float32, CPU | time | max error | PSNR | seams |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['way']} | {row['time']:.2f}x | {row['max_error']:.1e} | "
            f"{row['psnr_db']} | {row['seams']} |"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"Pairs: {options.pairs}. The process' peak over all of it: {peak:.0f} MiB.")


def _row(
    name: str,
    made: dict[str, torch.Tensor],
    seconds: dict[str, list[float]],
    options: Any,
    known: dict[str, Any],
) -> dict[str, Any]:
    error = made[name] - made[STOCK]
    mean_square = float(error.square().mean())
    step = options.tile - options.tile // 8 if name == TILED else 64
    edges = list(range(step, options.side, step)) if name != STOCK else []
    if name != STOCK:
        keep_map(error, RESULTS / f"vae_error_{name.lower()}.png")
    off = ((made[name] * 255).round() - (made[STOCK] * 255).round()).abs()
    seams = seam_ratio(error, edges, both=name == TILED)
    return {
        "way": name, "side_px": options.side, "tile_px": options.tile, "dtype": "float32",
        "device": "cpu", "threads": 1,
        "seconds": [round(value, 2) for value in seconds[name]],
        "time": statistics.median(
            a / b for a, b in zip(seconds[name], seconds[STOCK], strict=True)
        ),
        "max_error": float(error.abs().max()),
        "psnr_db": round(-10 * float(np.log10(mean_square)), 1) if mean_square else "exact",
        "seams": "-" if seams is None else round(seams, 2),
        "pixels_off_8bit": float((off.amax(-1) > 0).float().mean()),
        "most_off_8bit": float(off.max()),
        **known,
    }  # fmt: skip


if __name__ == "__main__":
    main()
