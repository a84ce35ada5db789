"""Peak of live activations in one full-size forward, by variant, on fake tensors.

    python run.py bench denoiser_peak [--variant NAME] [--case 2048x2048x1] [--show]

No weights and no GPU are needed: the host's own classes run on fake tensors in bfloat16, and the
storages alive are counted exactly. Weights, kernel workspaces and the allocator's fragmentation are
not in the figures. Attention counts as flash-like: its output and 4 bytes per query and head; the
fused norm and rotary embedding as its outputs, and with --eager with its float32 copies.
The latent and the text, which the caller holds, are in them. The host alone is also measured
through its apply_model, which holds the float32 latent as well.

Our nodes make many small operations, which take minutes on fake tensors at the largest sizes: so
they are measured with 2 main layers, which peak as 30 do, and rows measured before are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from pack.nodes.denoiser import need
from pack.nodes.denoiser.plan import denoiser_plan
from pack.nodes.denoiser.sizes import PIXELS_PER_LATENT, Z_IMAGE, Request
from pack.nodes.prefer import Prefer
from pack.nodes.units import MIB
from pack.testing import lean_models
from pack.testing.stock_forward import FakeDenoiser, settle_host
from pack.testing.tracker import Tracker

from .rows import RESULTS_DIR, Row, merged, versions, write
from .shown import denoiser_peak as shown
from .shown.denoiser_peak import APPLIED, BLOCK_LEVEL, CALLED, CHECKPOINT, DEFAULT, RESERVED, STOCK

RESULTS = RESULTS_DIR / "denoiser_peak.jsonl"
TEXT_TOKENS = 256
CASES = ((1024, 1024, 1), (512, 512, 4), (2048, 2048, 1), (1024, 1024, 4), (4096, 4096, 1))
ROUTES = {
    CALLED: "The transformer, called as by the host's apply_model",
    APPLIED: "Through the host's apply_model",
}
RESERVE = "reserve"  # the variant of the rows without a measurement
TITLES = {
    "denoiser_peak": ROUTES[CALLED], "denoiser_peak_applied": ROUTES[APPLIED],
    "denoiser_reserve": "What the host keeps free for the call",
}  # fmt: skip


class Case(NamedTuple):
    """One cell: the request, how it is called, and the tracker's options."""

    request: Request
    route: str
    tracking: Mapping[str, Any]


def stock(denoiser: FakeDenoiser, case: Case) -> Tracker:
    """The host alone."""
    return denoiser.measure(case.request, route=case.route, **case.tracking)


def training_checkpoint(denoiser: FakeDenoiser, case: Case) -> Tracker:
    """torch.utils.checkpoint around the whole denoiser, as tutorials have it for sampling."""
    from torch.utils.checkpoint import checkpoint

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(call, *args, use_reentrant=False, **kwargs)

    return denoiser.measure(case.request, route=case.route, around=around, **case.tracking)


def lean(
    denoiser: FakeDenoiser, case: Case, *, prefer: Prefer = "balance", is_whole: bool = True
) -> Tracker:
    """Apply Gradient Checkpoint with that preference.

    Without `is_whole` only the lean blocks stand, under the host's own forward: what a request
    gets that the lean forward does not take.
    """
    from comfy.patcher_extension import WrappersMP
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    patcher = ApplyGradientCheckpoint.execute(denoiser.patcher(), prefer=prefer).args[0]
    if not is_whole:
        options = patcher.model_options["transformer_options"]
        keys = [patcher.wrappers, options.get("wrappers", {})]
        for key in {key for w in keys for key in w.get(WrappersMP.DIFFUSION_MODEL, {})}:
            patcher.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, key)
    return denoiser.measure(case.request, patcher=patcher, route=case.route, **case.tracking)


# Column -> what measures it. A variant made of nodes patches `denoiser.patcher()` with them and
# hands the result to `denoiser.measure(..., patcher=...)`.
VARIANTS: dict[str, Callable[[FakeDenoiser, Case], Tracker]] = {
    STOCK: stock,
    CHECKPOINT: training_checkpoint,
    "speed": functools.partial(lean, prefer="speed"),
    DEFAULT: lean,
    "smallest": functools.partial(lean, prefer="smallest"),
    BLOCK_LEVEL: functools.partial(lean, is_whole=False),
}
# Variants of many small operations, slow on fake tensors: measured with fewer main layers.
FEW_LAYERS = 2
LEAN = [name for name, variant in VARIANTS.items() if variant not in (stock, training_checkpoint)]


def measure(
    denoiser: FakeDenoiser,
    names: Iterable[str],
    requests: Sequence[Request],
    *,
    attention: str,
    is_eager: bool,
) -> list[dict[str, Any]]:
    """Runs every variant on every request by both routes; returns one row each."""
    rows = []
    tracking = {"attention": attention, "opened": ["comfy_kitchen"] if is_eager else []}
    for name in names:
        for request in requests:
            for route in ROUTES if name not in LEAN else [CALLED]:
                start = time.perf_counter()
                with lean_models.without_kernels() if is_eager else nullcontext():
                    tracker = VARIANTS[name](denoiser, Case(request, route, tracking))
                row = {
                    "variant": name, "route": route, "attention": attention, "eager": is_eager,
                    "width_px": request.width_px, "height_px": request.height_px,
                    "batch": request.batch, "text_tokens": request.text_tokens,
                    "layers": denoiser.sizes.layers, "dtype": "bfloat16",
                    "device": f"fake {denoiser.device.type}",
                    "peak_bytes": tracker.peak_bytes, "peak_op": tracker.peak_op,
                    "stream_bytes": request.stream_bytes,
                    "seconds": round(time.perf_counter() - start, 2),
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{name}, {request.width_px}x{request.height_px} b{request.batch}, {route}: "
                    f"{tracker.peak_bytes / MIB:.1f} MiB ({row['seconds']} s)",
                    file=sys.stderr,
                )
    return rows


def kept_rows(measured: Sequence[Row]) -> list[Row]:
    """The rows in the results file and the measured ones, which replace those of the same cell."""
    rows = merged(RESULTS, measured, ("variant", "route", "width_px", "height_px", "batch"))
    order = [*VARIANTS, RESERVE]
    known = [row for row in rows if row["variant"] in order]
    return sorted(
        known,
        key=lambda row: (
            order.index(row["variant"]),
            CASES.index((row["width_px"], row["height_px"], row["batch"])),
        ),
    )


def reserves(requests: Sequence[Request]) -> list[Row]:
    """What the host is told to keep free for a call, and its own estimate; nothing is measured."""
    from comfy.supported_models import ZImage

    rows = []
    for request in requests:
        asked = dataclasses.replace(request, text_tokens=need.TEXT_TOKENS)
        area = request.batch * request.width_px * request.height_px // PIXELS_PER_LATENT**2
        # memory_required in the host's comfy/model_base.py, with attention that holds no scores.
        own = area * request.dtype_bytes * 0.01 * ZImage.memory_usage_factor * MIB
        rows.append({
            "variant": RESERVE, "route": RESERVED, "width_px": request.width_px,
            "height_px": request.height_px, "batch": request.batch,
            "text_tokens": asked.text_tokens, "dtype": "bfloat16", "own_bytes": int(own),
            "reserve_bytes": need.denoiser_reserve_bytes(asked, denoiser_plan(asked)),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names_of_cases = ["{}x{}x{}".format(*case) for case in CASES]
    parser.add_argument("--layers", type=int, default=30, help="main layers (2: the same peak)")
    parser.add_argument(
        "--lean-layers", type=int, default=FEW_LAYERS, help="the same for the lean columns, slower"
    )
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only these columns")
    parser.add_argument("--case", action="append", choices=names_of_cases, help="only these")
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    parser.add_argument("--attention", choices=["flash", "math"], default="flash")
    parser.add_argument("--eager", action="store_true", help="comfy-kitchen without CUDA kernels")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        sizes = dataclasses.replace(Z_IMAGE, layers=options.layers)
        cases = [c for c in CASES if "{}x{}x{}".format(*c) in (options.case or names_of_cases)]
        requests = [Request(*case, text_tokens=TEXT_TOKENS, sizes=sizes) for case in cases]
        names = [] if options.show else options.variant or list(VARIANTS)
        few = dataclasses.replace(Z_IMAGE, layers=min(options.layers, options.lean_layers))
        tracking = {"attention": options.attention, "is_eager": options.eager}
        rows = []
        for of_size, chosen in (
            (sizes, [name for name in names if name not in LEAN]),
            (few, [name for name in names if name in LEAN]),
        ):
            rows += measure(FakeDenoiser(of_size), chosen, requests, **tracking)
        rows += [] if options.show else reserves(requests)
        known = versions()
    is_published = options.layers == Z_IMAGE.layers and options.attention == "flash"
    if is_published and not options.eager:
        rows = kept_rows([{**row, **known} for row in rows])
        write(RESULTS, rows)
    form = ", comfy-kitchen's eager form" if options.eager else ""
    print(
        f"Live-bytes peak of one forward, bfloat16, {options.layers} main layers (columns of our "
        f"nodes: {few.layers}, which peak alike), {TEXT_TOKENS} "
        f"text tokens, weights excluded, {options.attention} attention{form}, fake tensors. "
        f"ComfyUI {known['host']}, torch {known['torch']}, comfy-kitchen "
        f"{known['comfy_kitchen']}, Python {known['python']}."
    )
    made = shown.tables(rows)
    for name, title in TITLES.items():
        print(f"\n{title}:\n\n{made[name]}", end="")


if __name__ == "__main__":
    main()
