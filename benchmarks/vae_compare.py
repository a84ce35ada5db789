"""One real decode on the CPU, in six ways, or an encode: peak, time, error, seams, error maps.

    python run.py bench vae_compare [--vae wan] [--side 512] [--frames 5] [--way speed] [--show]

The host's VAE with seeded random weights, float32, one thread: the AutoencodingEngine at the widths
of Flux and Z-Image, or the WanVAE of Wan 2.1 and Qwen-Image with torch's attention, a picture or
with `--frames` a video. The weights of its last convolution are scaled (`--contrast`) so that few
values are clamped. Time is the processor's, which a busy machine disturbs less than the clock's.
Each of the `--pairs` runs all ways one after the other, and the ratios to the stock decode of the
same pair are taken; of several the median. Errors are against the stock decode. Seams: mean square
of the error within 4 pixels of the tiles' or strips' edges over that elsewhere; 1 is no seam.
VAEDecodeTiled: tiles of 512 that overlap by 64; for Wan tiles of half the side that overlap by a
quarter of that. Fallback: the decode of the host whose first try runs out of memory (injected).
Live: bytes of the tensors at the peak, weights excluded. Process: growth of the resident memory at
its peak, workspaces of convolutions included, as Linux counts it. `--exact` adds a float64 decode,
and how many 8-bit pixels equal it. `--encode` compares the host's encode with ours: of a picture as
Load Image gives it, whose channels lie last, and (planar) of one as Upscale Image gives it; with
`--exact` also the relative distance from a float64 encode. Rows of other sizes are kept.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .rows import PICTURES_DIR, RESULTS_DIR, cell_of, merged, versions, write
from .shown import vae_compare as shown
from .vae_measures import PeakProcess, keep_map, seam_ratio, unequal
from .vae_ways import FALLBACK, OURS, STOCK, TILED, VAES, WAYS, Compared

RESULTS = RESULTS_DIR / "vae_compare.jsonl"
KEY = ("vae", "task", "side_px", "frames", "contrast", "way")
MAPPED = (TILED, FALLBACK, "balance")  # whose error maps docs/measurements.md shows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    from pack.nodes.probe.tracker import PeakTracker

    torch.set_num_threads(1)
    compared = VAES[options.vae](options.contrast, options.side, options.frames)
    task = "encode" if options.encode else "decode"
    runs, given = compared.runs(task), compared.given(task)
    ways = [way for way in runs if way in (STOCK, *(options.way or WAYS))]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    made: dict[str, torch.Tensor] = {}
    grown: dict[str, int] = {}
    live: dict[str, int] = {}
    for pair in range(options.pairs):
        for way in ways:
            with PeakProcess() as process:
                start = time.process_time()
                made[way] = runs[way](given)[0]
                seconds[way].append(time.process_time() - start)
            grown[way] = process.nbytes
            print(f"pair {pair}, {way}: {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
    # Watching every operation takes time, so these runs are not timed.
    for way in ways:
        with PeakTracker() as tracker:
            runs[way](given)
        live[way] = tracker.peak_bytes
    exact = compared.exact(task, given) if options.exact else None
    rows = []
    for way in ways:
        ratios = (a / b for a, b in zip(seconds[way], seconds[STOCK], strict=True))
        row = {
            "vae": compared.name, "task": task, "side_px": options.side, "frames": options.frames,
            "contrast": options.contrast, "way": way,
            "dtype": "float32", "device": "cpu", "threads": 1, "pairs": options.pairs,
            "live_bytes": live[way], "process_bytes": grown[way],
            "seconds": [round(value, 2) for value in seconds[way]],
            "time": round(statistics.median(ratios), 3),
            "max_error": float((made[way] - made[STOCK]).abs().max()),
        }  # fmt: skip
        if not options.encode:
            row |= _picture_figures(compared, way, made, exact)
            if way in MAPPED and options.maps:
                keep_map(made[way] - made[STOCK], PICTURES_DIR / f"vae_error_{way.lower()}.png")
        elif exact is not None:
            row["from_float64"] = float((made[way].double() - exact).norm() / exact.norm())
        rows.append(row)
    return rows


def _picture_figures(
    compared: Compared, way: str, made: dict[str, torch.Tensor], exact: torch.Tensor | None
) -> dict[str, Any]:
    error = made[way] - made[STOCK]
    mean_square = float(error.square().mean())
    off, most = unequal(made[way], made[STOCK])
    seams = seam_ratio(error, compared.edges(way), both=way not in OURS)
    return {
        "psnr_db": round(-10 * float(np.log10(mean_square)), 1) if mean_square else None,
        "seams": None if seams is None else round(seams, 2),
        "pixels_off_8bit": off, "most_off_8bit": most,
        "pixels_off_float64": None if exact is None else unequal(made[way], exact)[0],
        "clamped": float(((made[way] <= 0) | (made[way] >= 1)).float().mean()),
    }  # fmt: skip


def kept_rows(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the results file and the measured ones, which replace those of their cell."""
    rows = merged(RESULTS, measured, KEY)
    return sorted(rows, key=lambda row: (*cell_of(row, KEY[:-1]), WAYS.index(row["way"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", choices=VAES, default="flux")
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--frames", type=int, default=1, help="of a video of Wan")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--contrast", type=float, default=0.5, help="of the last convolution")
    parser.add_argument("--way", action="append", choices=WAYS[1:], help="only these, and stock")
    parser.add_argument("--exact", action="store_true", help="compute in float64 too")
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--maps", action="store_true", help="keep the error maps")
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    options = parser.parse_args()
    if options.vae == "flux" and options.frames != 1:
        parser.error("--frames: Flux's VAE makes pictures")
    if options.vae != "flux" and options.maps:
        parser.error("--maps: kept of Flux's VAE alone")

    if not options.show:
        from pack.testing.stock_forward import settle_host

        with tempfile.TemporaryDirectory() as base_dir, torch.inference_mode():
            settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
            known = versions()
            write(RESULTS, kept_rows([{**row, **known} for row in measure(options)]))
    rows = kept_rows([])
    for table in shown.tables(rows).values():
        print(f"\n{table}", end="")
    for cell in sorted({cell_of(row, KEY[:-1]) for row in rows if "clamped" in row}):
        row = next(row for row in rows if cell_of(row, KEY[:-1]) == cell)
        print(
            f"{row['vae']}, {shown.case(row)}, pairs: {row['pairs']}: {100 * row['clamped']:.1f} % "
            f"of the stock picture's values are clamped (contrast {row['contrast']})."
        )


if __name__ == "__main__":
    main()
