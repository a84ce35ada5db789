"""One real decode on the CPU, in six ways, or an encode: peak, time, error, seams, error maps.

    python run.py bench vae_compare [--side 512] [--pairs 1] [--way speed] [--exact] [--show]

The host's AutoencodingEngine at the widths of Flux and Z-Image with seeded random weights, float32,
one thread. The weights of its last convolution are scaled (`--contrast`) so that few values are
clamped. Time is the processor's, which a busy machine disturbs less than the clock's. Each pair
runs all ways one after the other, and the ratios to the stock decode of the same pair are taken; of
several the median. Errors are against the stock decode. Seams: mean square of the error within 4
pixels of the tiles' or strips' edges over that elsewhere; 1 is no seam. VAEDecodeTiled: tiles of
512 that overlap by 64. Fallback: the decode of the host whose first try runs out of memory
(injected). Live: bytes of the tensors at the peak, weights excluded. Process: growth of the
resident memory at its peak, workspaces of convolutions included, as Linux counts it. `--exact`
adds a float64 decode, and how many 8-bit pixels equal it. `--encode` compares the host's encode
with ours: of a picture as Load Image gives it, whose channels lie last, and (planar) of one as
Upscale Image gives it; with `--exact` also the relative distance from a float64 encode. Rows of
other sizes are kept.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pack.nodes.units import MIB

from .rows import RESULTS_DIR, cell_of, merged, versions, write

RESULTS = RESULTS_DIR / "vae_compare.jsonl"
STOCK, PLANAR, TILED, FALLBACK = "stock", "stock, planar", "VAEDecodeTiled", "fallback"
OURS = ("speed", "balance", "smallest")
WAYS = (STOCK, PLANAR, TILED, FALLBACK, *OURS)
KEY = ("task", "side_px", "contrast", "way")
# In latent pixels, as the node VAEDecodeTiled and the host's fallback call the host's tiles.
TILES = {TILED: (64, 8), FALLBACK: (64, 16)}
NEAR_PX = 4
HEADS = (
    "way", "live", "process", "time", "max error", "PSNR", "seams", "8-bit pixels equal",
    "most off", "equal to float64",
)  # fmt: skip
ENCODE_HEADS = (*HEADS[:5], "from float64")


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


def tile_edges(side: int, tile: int, overlap: int) -> Iterator[int]:
    """Where the host's three passes of tiles begin and end in a side, all in latent pixels."""
    for length in (tile // 2, tile, tile * 2):
        if length < side:
            for start in range(0, side - overlap, length - overlap):
                yield from (edge for edge in (start, start + length) if 0 < edge < side)


class PeakProcess:
    """Growth of the process' resident memory at its peak; Linux only."""

    def __enter__(self) -> PeakProcess:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self._start = self._kib("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.nbytes = 1024 * (self._kib("VmHWM") - self._start)

    @staticmethod
    def _kib(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))


def fallback(vae: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The host's decode whose first try ends as an out-of-memory error of the card does."""

    def fail(*args: object) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("injected")

    def decode(latent: torch.Tensor) -> torch.Tensor:
        nonlocal handle
        handle = vae.first_stage_model.decoder.register_forward_pre_hook(fail)
        return vae.decode(latent)

    handle: Any = None
    return decode


def exact_decode(vae: Any, latent: torch.Tensor) -> torch.Tensor:
    model = copy.deepcopy(vae.first_stage_model).double()
    return ((model.decode(latent.double()) + 1) / 2).clamp(0, 1).movedim(1, -1)[0]


def exact_encode(vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    model = copy.deepcopy(vae.first_stage_model).double()
    return model.encode(vae.process_input(pictures.movedim(-1, 1).double()))[0]


def unequal(one: torch.Tensor, two: torch.Tensor) -> tuple[float, float]:
    """The share of pixels that differ after 8 bits, and by how much at most."""
    off = ((one.double() * 255).round() - (two.double() * 255).round()).abs().amax(-1)
    return float((off > 0).double().mean()), float(off.max())


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way."""
    from pack.nodes.host.vae.patch import example_call
    from pack.nodes.probe.tracker import PeakTracker
    from pack.nodes.vae.choice import VaeChoice
    from pack.testing.vae_models import engine_vae, lean

    torch.set_num_threads(1)
    vae, side = engine_vae(), options.side // 8
    for parameter in vae.first_stage_model.decoder.conv_out.parameters():
        parameter.mul_(options.contrast)
    tile, overlap = TILES[TILED]
    task = "encode" if options.encode else "decode"
    patched = {prefer: lean(vae, prefer) for prefer in OURS}
    runs: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        STOCK: getattr(vae, task),
        TILED: lambda latent: vae.decode_tiled(latent, tile_x=tile, tile_y=tile, overlap=overlap),
        FALLBACK: fallback(vae),
        PLANAR: lambda pictures: vae.encode(pictures.movedim(-1, 1).contiguous().movedim(1, -1)),
        **{prefer: getattr(patched[prefer], task) for prefer in OURS},
    }
    known = (PLANAR, *OURS) if options.encode else (TILED, FALLBACK, *OURS)
    ways = [STOCK, *(way for way in known if way in (options.way or WAYS))]
    torch.manual_seed(0)
    given = torch.randn(1, vae.latent_channels, side, side)
    if options.encode:
        given = torch.rand(1, options.side, options.side, 3)
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
    exactly = exact_encode if options.encode else exact_decode
    exact = exactly(vae, given) if options.exact else None
    rows = []
    for way in ways:
        edges: list[int] = []
        if way in TILES:
            edges = sorted({8 * edge for edge in tile_edges(side, *TILES[way])})
        elif way in OURS:
            plan = VaeChoice(way, 0).plan(example_call(patched[way], options.side))
            edges = list(range(plan.levels[-1].limit, options.side, plan.levels[-1].limit))
        ratios = (a / b for a, b in zip(seconds[way], seconds[STOCK], strict=True))
        row = {
            "task": task, "side_px": options.side, "contrast": options.contrast, "way": way,
            "dtype": "float32", "device": "cpu", "threads": 1, "pairs": options.pairs,
            "live_bytes": live[way], "process_bytes": grown[way],
            "seconds": [round(value, 2) for value in seconds[way]],
            "time": round(statistics.median(ratios), 3),
            "max_error": float((made[way] - made[STOCK]).abs().max()),
        }  # fmt: skip
        if not options.encode:
            row |= _picture_figures(way, made, edges, exact, options)
        elif exact is not None:
            row["from_float64"] = float((made[way].double() - exact).norm() / exact.norm())
        rows.append(row)
    return rows


def _picture_figures(
    way: str,
    made: dict[str, torch.Tensor],
    edges: list[int],
    exact: torch.Tensor | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    error = made[way] - made[STOCK]
    if way != STOCK and options.maps:
        keep_map(error, RESULTS_DIR / f"vae_error_{way.lower()}.png")
    mean_square = float(error.square().mean())
    off, most = unequal(made[way], made[STOCK])
    seams = seam_ratio(error, edges, both=way in TILES)
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


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one cell as Markdown."""
    is_picture = "psnr_db" in rows[0]
    heads = HEADS if is_picture else ENCODE_HEADS
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row["way"],
            f"{row['live_bytes'] / MIB:.0f} MiB",
            f"{row['process_bytes'] / MIB:.0f} MiB",
            f"{row['time']:.2f}x",
            f"{row['max_error']:.1e}",
        ]
        if is_picture:
            seams, psnr, exact = row["seams"], row["psnr_db"], row["pixels_off_float64"]
            cells += [
                "-" if psnr is None else f"{psnr} dB",
                "-" if seams is None else f"{seams:.2f}",
                f"{100 - 100 * row['pixels_off_8bit']:.3f} %",
                f"{row['most_off_8bit']:.0f}",
                "not measured" if exact is None else f"{100 - 100 * exact:.3f} %",
            ]
        else:
            exact = row.get("from_float64")
            cells.append("not measured" if exact is None else f"{exact:.1e}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--contrast", type=float, default=0.5, help="of the last convolution")
    parser.add_argument("--way", action="append", choices=WAYS[1:], help="only these, and stock")
    parser.add_argument("--exact", action="store_true", help="compute in float64 too")
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--maps", action="store_true", help="keep the error maps")
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    options = parser.parse_args()

    if not options.show:
        from pack.testing.stock_forward import settle_host

        with tempfile.TemporaryDirectory() as base_dir, torch.inference_mode():
            settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
            known = versions()
            write(RESULTS, kept_rows([{**row, **known} for row in measure(options)]))
    rows = kept_rows([])
    for cell in sorted({cell_of(row, KEY[:-1]) for row in rows}):
        mine = [row for row in rows if cell_of(row, KEY[:-1]) == cell]
        task, side, contrast = cell
        text = f"{task} {side}x{side}, float32, 1 thread, pairs: {mine[0]['pairs']}"
        if "clamped" in mine[0]:
            text += (
                f"; {100 * mine[0]['clamped']:.1f} % of the stock picture's values are clamped "
                f"(contrast {contrast})"
            )
        print(f"\n{text}.\n\n{table(mine)}")


if __name__ == "__main__":
    main()
