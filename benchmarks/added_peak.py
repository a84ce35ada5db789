"""Peak of live activations beside what people add: ControlNets, references, patches of other nodes.

    python run.py bench added_peak [--case 2048x2048x1] [--added "2 references"] [--show]

As denoiser_peak: the host's own classes on fake tensors in bfloat16, 2 main layers, which peak as
30 do. References are as large as the picture and have no texts. The patch of another node adds a
number. Of ControlNets their streams count, and neither their weights nor the latent of the hint.
Rows measured before are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pack.nodes.denoiser.need import References, with_references
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.nodes.prefer import Prefer
from pack.nodes.units import MIB
from pack.testing.control_models import fake_controlled
from pack.testing.stock_forward import FakeDenoiser, settle_host

from .rows import RESULTS_DIR, cell_of, merged, versions, write
from .shown import added_peak as shown

RESULTS = RESULTS_DIR / "added_peak.jsonl"
CASES = ((1024, 1024, 1), (512, 512, 4), (2048, 2048, 1))
# What is added: reference pictures, whether a patch, a ControlNet of that name.
ADDED: dict[str, tuple[int, bool, str]] = {
    "nothing": (0, False, ""),
    "a patch of another node": (0, True, ""),
    "1 reference": (1, False, ""),
    "2 references": (2, False, ""),
    "2 references and a patch": (2, True, ""),
    "ControlNet Union 2.1": (0, False, "union 2.1"),
}
WAYS: dict[str, Prefer | None] = {
    "ComfyUI alone": None, "speed": "speed", "balance (default)": "balance",
}  # fmt: skip
LAYERS = 2
KEY = ("way", "added", "width_px", "height_px", "batch")


def measured_bytes(denoiser: FakeDenoiser, request: Request, added: str, way: str) -> int:
    """The peak of one forward."""
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    references, has_patch, net = ADDED[added]
    request = with_references(request, [References([request.latent_shape] * references)])
    prefer, patcher = WAYS[way], denoiser.patcher()
    if prefer is not None:
        patcher = ApplyGradientCheckpoint.execute(patcher, prefer=prefer).args[0]
    if has_patch:
        patcher.set_model_double_block_patch(lambda args: {"img": args["img"].add_(1)})
    if not net:
        return denoiser.measure(request, patcher=patcher).peak_bytes
    with fake_controlled(denoiser, patcher, request, net) as controlled:
        return denoiser.measure(request, patcher=controlled).peak_bytes


def name_of(case: Sequence[int]) -> str:
    return "{}x{}x{}".format(*case)


def kept_rows(*new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the results file, and the new ones, which replace those of their cell."""

    def place(row: dict[str, Any]) -> tuple[int, int, int]:
        way, added, *case = cell_of(row, KEY)
        return CASES.index((*case,)), list(ADDED).index(added), list(WAYS).index(way)

    return sorted(merged(RESULTS, new, KEY), key=place)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [name_of(case) for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only these pictures")
    parser.add_argument("--added", action="append", choices=list(ADDED), help="only these rows")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only these columns")
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        known = versions()
        denoiser = FakeDenoiser(dataclasses.replace(Z_IMAGE, layers=LAYERS))
        cells = [
            (case, added, way)
            for case in (() if options.show else CASES)
            for added in options.added or ADDED
            for way in options.way or WAYS
            if name_of(case) in (options.case or names)
        ]
        for case, added, way in cells:
            start = time.perf_counter()
            peak = measured_bytes(denoiser, Request(*case), added, way)
            row = {
                "way": way, "added": added, "width_px": case[0], "height_px": case[1],
                "batch": case[2], "text_tokens": 256, "layers": LAYERS, "dtype": "bfloat16",
                "device": f"fake {denoiser.device.type}", "peak_bytes": peak,
                "seconds": round(time.perf_counter() - start, 2), **known,
            }  # fmt: skip
            write(RESULTS, kept_rows(row))
            print(f"{name_of(case)}, {added}, {way}: {peak / MIB:.1f} MiB", file=sys.stderr)
    print(
        f"Live-bytes peak of one forward, bfloat16, {LAYERS} main layers, 256 text tokens, "
        f"weights excluded, flash attention, fake tensors. ComfyUI {known['host']}, torch "
        f"{known['torch']}, comfy-kitchen {known['comfy_kitchen']}, Python {known['python']}."
    )
    print(f"\n{shown.tables(kept_rows())['added_peak']}", end="")


if __name__ == "__main__":
    main()
