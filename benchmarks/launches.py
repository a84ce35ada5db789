"""Launches, host waits, bytes moved, peak and issue time: ComfyUI and each setting of our nodes.

    python run.py bench launches [--part denoiser decode] [--side 1024] [--setting balance] [--show]

No weights and no GPU are needed: the host's own classes run in bfloat16 on fake CUDA tensors, and
each operation is counted (testing/launches.py). denoiser: one main block, and the peak of the
forward, 256 text tokens, batch 1. decode, encode: one picture through the VAE of Flux and Z-Image.
Their plots: the denoiser by head groups and chunks of tokens, the decode by rows of a strip.

Issue time: how long one CPU thread issues them on meta tensors, and that as a multiple of the
host's in the same run, medians of pairs that take turns. It is real time of this machine for the
caller's Python and torch's dispatcher; the kernels only make their results (testing/issue_time.py).
Modelled: seconds on a card by its data sheet, a calculation (nodes/denoiser/cost.py). Rows measured
before are kept.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from inspect import isfunction
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pack.nodes.denoiser.cost import CARDS, Card, Work
from pack.nodes.denoiser.cost import seconds as cost_seconds
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.testing.issue_time import Around, IssueTimes
from pack.testing.launches import Counts, Launches, run_main_block
from pack.testing.stock_forward import FakeDenoiser, settle_host

from .rows import PICTURES_DIR, RESULTS_DIR, Row, merged, read, versions, write
from .shown import launches as shown
from .shown.launches import HOST, PLOTTED_PX, PREFERENCES, SETTINGS, SLICED

RESULTS = RESULTS_DIR / "launches.jsonl"
PARTS = (*shown.PARTS, "denoiser-plot", "decode-plot")
SIDES = (512, 1024, 2048, 4096)
TEXT_TOKENS = 256
# For the CPU to notice that the card has finished, and for the card to get new work.
WAIT_S = 25e-6
# Main layers of the two forwards whose difference is timed.
LAYERS = (2, 10)
KEY = ("part", "side_px", "setting")
# Of the plots.
GROUPS = (1, 2, 3, 5, 10, 30)
CHUNKS = (256, 512, 1024, 2048, 4096, 65536)
STRIP_ROWS = (16, 32, 64, 128, 256, 512)


def patched(setting: str, model: Any) -> Any:
    """The model with Apply Gradient Checkpoint as the setting has it; Slice is behind balance."""
    from pack.nodes.attention_slice import AttentionSlice
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    if setting == HOST:
        return model
    if setting == SLICED:
        return AttentionSlice.execute(patched("balance", model), "auto").args[0]
    return ApplyGradientCheckpoint.execute(model, prefer=setting).args[0]


def modelled_seconds(card: Card, counts: Counts) -> float:
    """Seconds on a card by the cost model; host waits stop all, and copies hide behind nothing."""
    work = Work(counts.launches, counts.flops, counts.moved_bytes, counts.row_bytes)
    copying = counts.copied_bytes / card.copy_bytes_per_s
    return cost_seconds(work, card) + counts.host_waits * WAIT_S + copying


def row(part: str, setting: str, side: int, counts: Counts, peak: int) -> Row:
    """What every row has."""
    return {
        "part": part, "setting": setting, "side_px": side, "batch": 1, "dtype": "bfloat16",
        "device": "fake cuda", "launches": counts.launches, "host_waits": counts.host_waits,
        "moved_bytes": counts.moved_bytes, "row_bytes": counts.row_bytes,
        "copied_bytes": counts.copied_bytes, "flops": counts.flops, "peak_bytes": peak,
        "modelled_s": {card.name: modelled_seconds(card, counts) for card in CARDS},
    }  # fmt: skip


def of_denoiser(
    denoiser: FakeDenoiser,
    side: int,
    setting: str,
    patch: Callable[[Any], Any],
    around: Around | None = None,
) -> Row:
    """One main block."""
    request = Request(side, side, text_tokens=TEXT_TOKENS, sizes=denoiser.sizes)
    run = run_main_block(denoiser, request, patch(denoiser.patcher()), around=around)
    return {
        **row("denoiser", setting, side, run.block, run.tracker.peak_bytes),
        "text_tokens": TEXT_TOKENS, "layers": denoiser.sizes.layers,
    }  # fmt: skip


def of_vae(
    fake: Any,
    part: str,
    side: int,
    prefer: str,
    *,
    strip_rows: int = 0,
    around: Around | None = None,
) -> Row:
    """One picture through the VAE."""
    if around is not None:
        fake.around = around
    with Launches() as seen:
        if prefer == HOST:
            tracker = fake.stock(side, side)
        else:
            tracker, _, _ = fake.measure(side, side, prefer, strip_rows=strip_rows)
    return {
        **row(part, prefer, side, seen.counts, tracker.peak_bytes),
        "convolutions": len(seen.convolutions),
    }


def denoiser_points(denoiser: FakeDenoiser, side: int) -> Iterator[Row]:
    """Points of the plot beside the settings: the node's head groups and chunks."""
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    for groups, chunk in itertools.product(GROUPS, CHUNKS):
        inputs = {"head_groups": groups, "chunk_tokens": chunk}
        name = ", ".join(f"{key} {value}" for key, value in inputs.items())
        found = of_denoiser(
            denoiser, side, name,
            lambda model, i=inputs: ApplyGradientCheckpoint.execute(model, **i).args[0],
        )  # fmt: skip
        yield {**found, "part": "denoiser-plot", "line": f"head_groups {groups}"}


def decode_points(fake: Any, side: int) -> Iterator[Row]:
    """Points of the plot beside the settings: the node's rows of a strip."""
    for prefer, rows in itertools.product(PREFERENCES, STRIP_ROWS):
        found = of_vae(fake, "decode-plot", side, prefer, strip_rows=rows)
        yield {**found, "setting": f"{prefer}, strip_rows {rows}", "line": prefer}


def timed_block(times: IssueTimes, denoiser: FakeDenoiser, side: int, setting: str) -> Row:
    """Counts one main block, and adds forwards of two lengths to the times."""
    request, patch = Request(side, side, text_tokens=TEXT_TOKENS), partial(patched, setting)

    def run(model: FakeDenoiser, around: Around) -> None:
        model.measure(request, patcher=patch(model.patcher()), around=around)

    for layers in LAYERS:
        on_meta = FakeDenoiser(replace(denoiser.sizes, layers=layers), device="meta")
        times.add(("denoiser", side, setting, layers), partial(run, on_meta))
    return times.record(lambda around: of_denoiser(denoiser, side, setting, patch, around))


def timed_picture(
    times: IssueTimes, fake: Any, on_meta: Any, part: str, side: int, prefer: str
) -> Row:
    """Counts one picture through the VAE, and adds it to the times."""

    def run(vae: Any, around: Around) -> Row:
        with _asked_for_a_card():
            return of_vae(vae, part, side, prefer, around=around)

    times.add((part, side, prefer, 1), partial(run, on_meta))
    return times.record(partial(run, fake))


@contextmanager
def _asked_for_a_card() -> Iterator[None]:
    """Lean VAE treats every device as a card, so that meta tensors go the same way."""
    from pack.nodes.vae import devices

    def asked(question: Callable[..., Any]) -> Callable[..., Any]:
        return lambda device, *rest: question(torch.device("cuda"), *rest)

    package = devices.__name__.rpartition(".")[0]
    with ExitStack() as until:
        for name, module in list(sys.modules.items()):
            for key, value in list(vars(module).items()) if name.startswith(package) else ():
                if isfunction(value) and value.__module__ == devices.__name__:
                    until.enter_context(mock.patch.object(module, key, asked(value)))
        yield


def with_issue_time(rows: Sequence[Row], times: IssueTimes, repeats: int) -> list[Row]:
    """The rows with the time to issue them, and that as a multiple of the host's."""
    found = times.seconds(repeats)

    def seconds(row: Row, setting: str) -> list[float]:
        part, side = row["part"], row["side_px"]
        if part != "denoiser":
            return found[part, side, setting, 1]
        few, many = (found[part, side, setting, layers] for layers in LAYERS)
        return [(b - a) / (LAYERS[1] - LAYERS[0]) for a, b in zip(few, many, strict=True)]

    made = []
    for row in rows:
        mine, host = seconds(row, row["setting"]), seconds(row, HOST)
        ratio = statistics.median(own / base for own, base in zip(mine, host, strict=True))
        made.append({**row, "issue_s": statistics.median(mine), "issue_ratio": ratio})
    return [{**row, "issue_pairs": repeats} for row in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--side", type=int, nargs="+", default=SIDES)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--pairs", type=int, default=9, help="of issue times")
    parser.add_argument("--show", action="store_true", help="only show the rows counted before")
    options = parser.parse_args()

    if not options.show:
        with tempfile.TemporaryDirectory() as base_dir:
            settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
            measure(options)
    rows = read(RESULTS)
    print(
        "Counted on fake CUDA tensors, bfloat16, batch 1. denoiser: one main block, "
        f"{TEXT_TOKENS} text tokens; its peak is that of the forward. Modelled: a calculation by "
        "data sheets, no card was timed. ComfyUI {host}, torch {torch}, comfy-kitchen "
        "{comfy_kitchen}.".format(**rows[-1])
    )
    for table in shown.tables(rows).values():
        print(f"\n{table}", end="")
    shown.draw(rows, PICTURES_DIR)


def measure(options: argparse.Namespace) -> None:
    """Counts the chosen parts and adds their rows to the results, issue times last."""
    from pack.testing.vae_models import FakeVae

    denoiser, times = FakeDenoiser(replace(Z_IMAGE, layers=2)), IssueTimes()
    known = versions()
    rows: list[Row] = []

    def keep(found: Row) -> None:
        write(RESULTS, merged(RESULTS, [{**found, **known}], KEY))
        print(
            f"{found['part']} {found['side_px']} {found['setting']}: {found['launches']} launches",
            file=sys.stderr,
        )

    for part in (part for part in PARTS[:3] if part in options.part):
        fake, on_meta = (
            None if part == "denoiser" else FakeVae(is_decoder=part == "decode", device=device)
            for device in ("cuda", "meta")
        )
        for side in options.side:
            for setting in options.setting:
                if fake is None:
                    found = timed_block(times, denoiser, side, setting)
                elif setting == SLICED:
                    continue
                else:
                    found = timed_picture(times, fake, on_meta, part, side, setting)
                rows.append(found)
                keep(found)
    for side in PLOTTED_PX:
        if "denoiser-plot" in options.part:
            for found in denoiser_points(denoiser, side):
                keep(found)
        if "decode-plot" in options.part:
            for found in decode_points(FakeVae(is_decoder=True), side):
                keep(found)
    # Last: see Recorded.as_kernels.
    for found in with_issue_time(rows, times, options.pairs):
        keep(found)


if __name__ == "__main__":
    main()
