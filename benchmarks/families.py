"""Peak of live activations in one forward of other families' transformers, on fake tensors.

    python run.py bench families [--family "Qwen-Image"]
    python run.py bench --version 0.16.3 families

As denoiser_peak: the host's own classes at full width in bfloat16, two blocks of each kind, which
peak as all do, or the whole U-Net; flash-like attention; weights excluded. U is one residual stream
of the batch, in a U-Net that of the level with the most elements in a transformer. Columns of Apply
Gradient Checkpoint where it works on the family; "smallest" takes minutes on fake tensors. Some
also with weights in fewer bits, as most files have them; what a layer copies of them does count.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

from pack.nodes.prefer import Prefer
from pack.testing import families
from pack.testing.stock_forward import settle_host
from pack.testing.tracker import Tracker

from .rows import RESULTS_DIR, merged, versions, write
from .shown import families as shown

RESULTS = RESULTS_DIR / "families.jsonl"
# Files of these are rarely plain.
QUANTISED = ("FLUX.2 dev", "FLUX.1 dev", "Qwen-Image", "Wan 2.1 14B")
KEY = ("family", "case", "way", "host")
WAYS: dict[str, Prefer | None] = {
    "ComfyUI alone": None, "speed": "speed", "balance (default)": "balance",
    "smallest": "smallest",
}  # fmt: skip


def measured(
    family: families.Family, call: families.Call, prefer: Prefer | None, weights: str = "plain"
) -> Tracker:
    """One forward; prefer None: ComfyUI alone."""
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    def patched(patcher: Any) -> Any:
        if prefer is None:
            return patcher
        return ApplyGradientCheckpoint.execute(patcher, prefer=prefer).args[0]

    return families.measure(family, call, weights=weights, patched=patched)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", action="append", choices=families.FAMILIES, help="only these")
    parser.add_argument(
        "--weights", action="append", choices=["plain", *families.KINDS], help="only these"
    )
    parser.add_argument("--way", action="append", choices=list(WAYS), help="only these columns")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        known = versions()
        rows = []
        for name in options.family or families.FAMILIES:
            family = families.FAMILIES[name]
            ways = options.way or WAYS
            kinds = options.weights or ["plain", *(families.KINDS if name in QUANTISED else ())]
            cases = itertools.product(kinds, families.CALLS[name], ways)
            for kind, call, way in cases:
                if kind != "plain" and call.references:
                    continue  # as many tokens as of the larger picture
                tracker = measured(family, call, WAYS[way], kind)
                case = str(call) if kind == "plain" else f"{call}, {kind}"
                rows.append({
                    "family": name, "case": case, "way": way,
                    "text_tokens": call.text_tokens, "blocks": families.BLOCKS,
                    "dtype": "bfloat16", "device": f"fake {families.fake_device().type}",
                    "stream_bytes": families.stream_bytes(family, call),
                    "peak_bytes": tracker.peak_bytes, "peak_op": tracker.peak_op, **known,
                })  # fmt: skip
    rows = merged(RESULTS, rows, KEY)
    write(RESULTS, rows)
    print(
        f"Live-bytes peak of one forward, bfloat16, {families.BLOCKS} blocks of each kind (U-Nets: "
        f"all), weights excluded, flash attention, fake tensors. ComfyUI {known['host']}, torch "
        f"{known['torch']}, comfy-kitchen {known['comfy_kitchen']}, Python {known['python']}."
    )
    for table in shown.tables([row for row in rows if row["host"] == known["host"]]).values():
        print(f"\n{table}", end="")


if __name__ == "__main__":
    main()
