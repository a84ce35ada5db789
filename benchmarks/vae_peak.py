"""Peak of live bytes in one full-size VAE decode or encode, by preference, on fake tensors.

    python run.py bench vae_peak [--case 2048x2048x1] [--way decode] [--prefer balance] [--show]

No weights and no GPU are needed: the host's decoder and encoder (Flux and Z-Image; Wan 2.1 and
Qwen-Image; Wan 2.2 5B) run on fake tensors of a card in bfloat16, and the storages alive on it are
counted exactly; Flux's "smallest" keeps its large maps in RAM, which is not counted. Kernel
workspaces and the allocator's fragmentation are not in the figures. Attention counts as fused. The
arithmetic is that of the convolutions and the attention, relative to the host's. The last number of
a case is the batch, of Wan's the frames: its decode of many takes minutes. Wan's result is not
counted where it is not the host's own, as it goes to RAM strip by strip. Rows measured before are
kept.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pack.nodes.units import MIB

from .rows import RESULTS_DIR, cell_of, merged, versions, write
from .shown import vae_peak as shown
from .shown.vae_peak import FLUX, STOCK, WAN, WAN_22

RESULTS = RESULTS_DIR / "vae_peak.jsonl"
VAES = {FLUX: "", WAN: "wan-", WAN_22: "wan22-"}  # how the names of their cases begin


class Case(NamedTuple):
    """A picture of Flux in batches, or a video of Wan."""

    vae: str
    width_px: int
    height_px: int
    batch: int = 1
    frames: int = 1

    @property
    def name(self) -> str:
        """As it is chosen."""
        count = self.batch if self.vae == FLUX else self.frames
        return f"{VAES[self.vae]}{self.width_px}x{self.height_px}x{count}"

    def __str__(self) -> str:
        sides = f"{self.width_px}x{self.height_px}"
        if self.vae == FLUX:
            return f"{sides}, batch {self.batch}"
        return f"{self.vae}, {sides}, {self.frames} frame{'s' * (self.frames > 1)}"


CASES = (
    *(Case(FLUX, side, side) for side in (1024, 2048, 4096)),
    *(Case(FLUX, side, side, 4) for side in (512, 1024)),
    Case(WAN, 1024, 1024),
    Case(WAN, 2560, 1440),
    Case(WAN, 832, 480, frames=81),
    Case(WAN_22, 1280, 704),
    Case(WAN_22, 2560, 1440),
    Case(WAN_22, 1280, 704, frames=121),
)
COLUMNS = tuple(shown.COLUMNS)
WAYS = ("decode", "encode")
KEY = ("way", "prefer", *Case._fields)


def measure(fake: Any, way: str, prefer: str, case: Case) -> dict[str, Any]:
    """One row; `fake` is Flux's decoder or encoder, or a VAE of Wan."""
    start = time.perf_counter()
    run = _of_flux if case.vae == FLUX else _of_wan
    tracker, ratio = run(fake, way, prefer, case)
    return {
        "way": way, "prefer": prefer, **case._asdict(),
        "dtype": "bfloat16", "device": "fake cuda", "peak_bytes": tracker.peak_bytes,
        "peak_op": tracker.peak_op, "arithmetic": round(ratio, 3),
        "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip


def _of_flux(fake: Any, way: str, prefer: str, case: Case) -> tuple[Any, float]:
    _, width, height, batch, _ = case
    base = fake.stock_work(height, width)
    if prefer == STOCK:
        return fake.stock(height, width, batch=batch), 1.0
    tracker, work, _ = fake.measure(height, width, prefer, batch=batch)
    return tracker, work / base / batch


def _of_wan(fake: Any, way: str, prefer: str, case: Case) -> tuple[Any, float]:
    from pack.nodes.vae.video.choice import VideoChoice

    call = fake.call(case.height_px, case.width_px, case.frames, is_decoder=way == "decode")
    if prefer == STOCK:
        return fake.stock(call), 1.0
    plan = VideoChoice(prefer, 0).plan(call)  # type: ignore
    # Of a long video the preferences come to one plan.
    return _measured_wan(fake, call, plan.rows)  # type: ignore


@lru_cache(1)
def _measured_wan(fake: Any, call: Any, rows: int) -> tuple[Any, float]:
    from pack.nodes.vae.video.sizes import VideoPlan

    fake.stock(call)
    base = fake.arithmetic.total
    tracker = fake.measure(call, VideoPlan(rows, "speed"))
    return tracker, fake.arithmetic.total / base


def kept_rows(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the results file and the measured ones, which replace those of their cell."""
    return sorted(
        merged(RESULTS, measured, KEY),
        key=lambda row: (
            WAYS.index(row["way"]),
            CASES.index(Case(*cell_of(row, Case._fields))),
            COLUMNS.index(row["prefer"]),
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--case", action="append", choices=names, help="only these")
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--prefer", action="append", choices=COLUMNS)
    parser.add_argument("--show", action="store_true", help="print the rows measured before")
    options = parser.parse_args()

    from pack.testing.stock_forward import settle_host

    with tempfile.TemporaryDirectory() as base_dir:
        settle_host(Path(os.environ["ZIMAGE_HOST_DIR"]), Path(base_dir))
        from pack.testing.vae_models import FakeVae
        from pack.testing.video_models import FakeVideoVae

        known = versions()
        for way in () if options.show else options.way or WAYS:
            fakes: dict[str, Any] = {
                FLUX: FakeVae(is_decoder=way == "decode"),
                WAN: FakeVideoVae("2.1"),
                WAN_22: FakeVideoVae("2.2"),
            }
            for case in CASES:
                if case.name not in (options.case or names):
                    continue
                for prefer in options.prefer or COLUMNS:
                    row = {**measure(fakes[case.vae], way, prefer, case), **known}
                    write(RESULTS, kept_rows([row]))
                    print(
                        f"{way} {case.name} {prefer}: {row['peak_bytes'] / MIB:.1f} MiB, "
                        f"{row['arithmetic']}x, {row['seconds']} s",
                        file=sys.stderr,
                    )
    print(
        "Live-bytes peak on the card of one decode or encode, bfloat16, weights excluded, fake "
        f"tensors. ComfyUI {known['host']}, torch {known['torch']}."
    )
    for table in shown.tables(kept_rows([])).values():
        print(f"\n{table}", end="")


if __name__ == "__main__":
    main()
