"""Measures on this machine's card what the pack saves, what it costs, and whether it fits.

    python run.py bench card                  everything, 25 minutes; run it again to go on
    python run.py bench card --rehearse       on the CPU at tiny sizes, minutes: tries the parts
    python -m benchmarks.card --host DIR --out DIR      without run.py, where packages are there

Random weights of the true sizes unless --models names real ones: memory and time do not depend on
their values. Nothing else should use the card meanwhile. The folder gets rows.jsonl (every row, the
moment it is measured), report.md and a plot; none of them names a path or a prompt.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from . import campaign, catalogue, driver, plot, report, rows
from .job import GIB, Leg

OUT, REHEARSAL_OUT = ".card", ".card-rehearsal"
REHEARSAL_MINUTES = 15.0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    host = os.environ.get("ZIMAGE_HOST_DIR")
    parser.add_argument("--host", type=Path, default=host, metavar="DIR", help="a ComfyUI")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"for the results ({OUT})")
    parser.add_argument("--models", type=Path, metavar="DIR", help="real weights")
    parser.add_argument("--minutes", type=float, help="for this call, 25 if not named")
    parser.add_argument("--part", nargs="+", choices=catalogue.PARTS, default=catalogue.PARTS)
    parser.add_argument(
        "--gib", nargs="*", type=float, default=catalogue.CARDS_GIB, metavar="N",
        help="imitate cards of so many GiB (a process of its own holds the rest)",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, no card needed")
    options = parser.parse_args(argv)
    if options.host is None:
        parser.error("--host must name an unpacked ComfyUI (run.py bench card fetches one)")
    if not (options.host / "main.py").is_file():
        parser.error(f"--host: {options.host} is no ComfyUI: it has no main.py")
    if options.models is not None and not options.models.is_dir():
        parser.error(f"--models: {options.models} is no folder")
    if options.minutes is not None and options.minutes <= 0:
        parser.error(f"--minutes must be > 0, got {options.minutes:g}")
    return options


def announce(legs: Sequence[Leg], *, is_rehearsal: bool) -> None:
    """Says what comes and how long it takes."""
    print("To do, with the time that a fast card needs, about:")
    for leg in legs:
        if is_rehearsal and leg.needs_card:
            print(f"  {leg.title}: left out, {leg.needs_card}")
        else:
            print(f"  {leg.title}" + ("" if is_rehearsal else f": {leg.seconds:.0f} s"))
    if is_rehearsal:
        print("A rehearsal measures no card. It cannot try:")
        print("\n".join(f"  - {what}" for what in catalogue.NOT_REHEARSED))
    else:
        print(f"Together {sum(leg.seconds for leg in legs) / 60:.0f} minutes.", flush=True)


def why_not(folder: Path) -> str | None:
    """Why nothing can be measured here; None if it can."""
    import torch

    if not torch.cuda.is_available():
        return "not measured: torch sees no CUDA card here (--rehearse tries the parts without one)"
    here = driver.device_name()
    known = {row["device"] for row in rows.read(folder / "rows.jsonl") if row.get("device")}
    if here is not None and known - {here}:
        return f"{folder} holds rows of another card ({', '.join(sorted(known))}): name a new --out"
    return None


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    folder = (options.out or Path(REHEARSAL_OUT if options.rehearse else OUT)).resolve()
    if not options.rehearse and (reason := why_not(folder)):
        print(f"bench card: {reason}")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    legs = catalogue.legs(options.part, options.gib)
    announce(campaign.left_to_do(folder, legs), is_rehearsal=options.rehearse)
    minutes = options.minutes or (REHEARSAL_MINUTES if options.rehearse else 25.0)
    models = options.models and options.models.expanduser().resolve()
    settings = campaign.Campaign(
        folder, options.host.expanduser().resolve(), models, minutes, options.rehearse
    )
    is_whole, is_interrupted = False, False
    try:
        is_whole = campaign.run(settings, legs)
    except KeyboardInterrupt:
        is_interrupted = True
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
    finish(folder)
    return 130 if is_interrupted else 0 if is_whole else 1


def finish(folder: Path) -> None:
    """Makes the plot and the report of what is there, and says where they are."""
    if not (folder / "rows.jsonl").exists():
        return
    plot.draw(folder)
    summary = report.write(folder)
    work = folder / "work" / "models"
    taken = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
    if taken > GIB:
        print(f"{work} holds {taken / GIB:.0f} GiB of random weights: delete it when done.")
    print(f"Report: {folder / 'report.md'}\n\n{summary}", flush=True)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: the leg's processes are ended first
    sys.exit(main(sys.argv[1:]))
