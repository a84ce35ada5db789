"""Peak of live activations in one forward of other families' transformers, on fake tensors.

    python run.py bench families [--family "Qwen-Image"]

As denoiser_peak: the host's own classes at full width in bfloat16, two blocks of each kind, which
peak as all do; flash-like attention; weights excluded. U is one residual stream.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pack.nodes.units import MIB
from pack.testing import families
from pack.testing.stock_forward import settle_host

from .rows import RESULTS_DIR, merged, versions, write

RESULTS = RESULTS_DIR / "families.jsonl"
KEY = ("family", "case", "way")
STOCK = "ComfyUI alone"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per family and case."""
    lines = [f"| family, case | U | {STOCK} | in U | where |", "|---|---|---|---|---|"]
    for row in rows:
        peak, stream = row["peak_bytes"], row["stream_bytes"]
        lines.append(
            f"| {row['family']}, {row['case']} | {stream / MIB:.1f} MiB | {peak / MIB:.0f} MiB | "
            f"{peak / stream:.1f} | {row['peak_op']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", action="append", choices=families.FAMILIES, help="only these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        known = versions()
        rows = []
        for name in options.family or families.FAMILIES:
            family = families.FAMILIES[name]
            for call in families.CALLS[name]:
                tracker = families.measure(family, call)
                rows.append({
                    "family": name, "case": str(call), "way": STOCK,
                    "text_tokens": call.text_tokens, "blocks": families.BLOCKS,
                    "dtype": "bfloat16", "device": f"fake {families.fake_device().type}",
                    "stream_bytes": families.stream_bytes(family, call),
                    "peak_bytes": tracker.peak_bytes, "peak_op": tracker.peak_op, **known,
                })  # fmt: skip
    write(RESULTS, merged(RESULTS, rows, KEY))
    print(
        f"Live-bytes peak of one forward, bfloat16, {families.BLOCKS} blocks of each kind, weights "
        f"excluded, flash attention, fake tensors. ComfyUI {known['host']}, torch "
        f"{known['torch']}, comfy-kitchen {known['comfy_kitchen']}, Python {known['python']}."
    )
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
