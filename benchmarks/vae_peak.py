"""Peak of live bytes in one full-size VAE decode or encode, by preference, on fake tensors.

    python run.py bench vae_peak [--case 2048x2048x1] [--way decode] [--prefer balance] [--show]

No weights and no GPU are needed: the host's decoder and encoder (Flux, Z-Image) run on fake tensors
of a card in bfloat16, and the storages alive on it are counted exactly; "smallest" keeps its large
maps in RAM, which is not counted. Kernel workspaces and the allocator's fragmentation are not in
the figures. Attention counts as fused. The arithmetic is that of the convolutions and the
attention, relative to the host's. Rows measured before are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pack.nodes.units import MIB

from .rows import RESULTS_DIR, cell_of, merged, versions, write

RESULTS = RESULTS_DIR / "vae_peak.jsonl"
CASES = ((1024, 1024, 1), (2048, 2048, 1), (4096, 4096, 1), (512, 512, 4), (1024, 1024, 4))
STOCK = "stock"
COLUMNS = (STOCK, "speed", "balance", "smallest")
WAYS = ("decode", "encode")
KEY = ("way", "prefer", "width_px", "height_px", "batch")


def measure(fake: Any, way: str, prefer: str, case: tuple[int, int, int]) -> dict[str, Any]:
    """One row."""
    width, height, batch = case
    base = fake.stock_work(height, width)
    start = time.perf_counter()
    if prefer == STOCK:
        tracker, ratio = fake.stock(height, width, batch=batch), 1.0
    else:
        tracker, work, _ = fake.measure(height, width, prefer, batch=batch)
        ratio = work / base / batch
    return {
        "way": way, "prefer": prefer, "width_px": width, "height_px": height, "batch": batch,
        "dtype": "bfloat16", "device": "fake cuda", "peak_bytes": tracker.peak_bytes,
        "peak_op": tracker.peak_op, "arithmetic": round(ratio, 3),
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def kept_rows(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the results file and the measured ones, which replace those of their cell."""
    return sorted(
        merged(RESULTS, measured, KEY),
        key=lambda row: (
            WAYS.index(row["way"]),
            CASES.index((row["width_px"], row["height_px"], row["batch"])),
            COLUMNS.index(row["prefer"]),
        ),
    )


def table(rows: Sequence[dict[str, Any]], way: str) -> str:
    """The rows of one way as Markdown: a line per case, a column per preference."""
    cells = {cell_of(row, KEY[1:]): row for row in rows if row["way"] == way}
    lines = [f"| {way} | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for case in CASES:
        shown = []
        for prefer in COLUMNS:
            row = cells.get((prefer, *case))
            stock = cells.get((STOCK, *case))
            if row is None:
                shown.append("not measured")
                continue
            text = f"{row['peak_bytes'] / MIB:.0f} MiB"
            if prefer != STOCK and stock is not None:
                share = row["peak_bytes"] / stock["peak_bytes"]
                text += f" ({share:.2f}, arithmetic {row['arithmetic']:.2f}x)"
            shown.append(text)
        lines.append(f"| {case[0]}x{case[1]}, batch {case[2]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ["{}x{}x{}".format(*case) for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only these")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--prefer", action="append", choices=COLUMNS)
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    options = parser.parse_args()

    from pack.testing.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        from pack.testing.vae_models import FakeVae

        known = versions()
        for way in () if options.show else options.way or WAYS:
            fake = FakeVae(is_decoder=way == "decode")
            for case in CASES:
                if "{}x{}x{}".format(*case) not in (options.case or names):
                    continue
                for prefer in options.prefer or COLUMNS:
                    row = {**measure(fake, way, prefer, case), **known}
                    write(RESULTS, kept_rows([row]))
                    print(
                        f"{way} {case} {prefer}: {row['peak_bytes'] / MIB:.1f} MiB, "
                        f"{row['arithmetic']}x, {row['seconds']} s",
                        file=sys.stderr,
                    )
    print(
        "Live-bytes peak on the card of one decode or encode, bfloat16, weights excluded, fake "
        f"tensors. ComfyUI {known['host']}, torch {known['torch']}."
    )
    for way in WAYS:
        print(f"\n{table(kept_rows([]), way)}")


if __name__ == "__main__":
    main()
