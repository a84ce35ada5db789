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
from typing import NoReturn

from pack.nodes.units import GIB
from pack.runner.arguments import above_zero
from pack.runner.environment import SetupError
from pack.runner.model_files import offer_models

from . import campaign, catalogue, driver, plot, report, rows
from .job import Leg

OUT, REHEARSAL_OUT = ".card", ".card-rehearsal"
MINUTES, REHEARSAL_MINUTES, LEAST_MINUTES = 25.0, 15.0, 1.0
# Set by run.py, which starts this command in the project's folder.
CALLED_FROM = "ZIMAGE_CALLED_FROM"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def place(text: str) -> Path:
    """A path as the user meant it, who may stand in another folder."""
    return (Path(os.environ.get(CALLED_FROM, "")) / Path(text).expanduser()).resolve()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="bench card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    host = os.environ.get("ZIMAGE_HOST_DIR")
    parser.add_argument(
        "--host", type=place, default=host and place(host), metavar="DIR",
        help="an unpacked ComfyUI (run.py names the one that it fetched)",
    )  # fmt: skip
    parser.add_argument("--out", type=place, metavar="DIR", help=f"for the results (default {OUT})")
    parser.add_argument("--models", type=place, metavar="DIR", help="real weights (else random)")
    parser.add_argument("--minutes", type=above_zero, help=f"for this call (default {MINUTES:g})")
    parser.add_argument(
        "--part", nargs="+", choices=catalogue.PARTS, default=catalogue.PARTS, metavar="NAME",
        help=f"only these (default: {' '.join(catalogue.PARTS)})",
    )  # fmt: skip
    parser.add_argument(
        "--gib", nargs="*", type=above_zero, default=catalogue.CARDS_GIB, metavar="N",
        help="cards of so many GiB to imitate: a process of its own holds the rest "
        f"(default {' '.join(f'{gib:g}' for gib in catalogue.CARDS_GIB)}; none: the card as it is)",
    )  # fmt: skip
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, no card needed")
    options = parser.parse_args(argv)
    if options.host is None:
        parser.error("--host must name an unpacked ComfyUI (run.py bench card fetches one)")
    if not (options.host / "main.py").is_file():
        parser.error(f"--host: {options.host} is not a ComfyUI folder: it has no main.py")
    if options.minutes is not None and options.minutes < LEAST_MINUTES:
        parser.error(f"--minutes must be >= {LEAST_MINUTES:g}, got {options.minutes:g}")
    options.out = options.out or campaign.REPO / (REHEARSAL_OUT if options.rehearse else OUT)
    return options


def prepare(options: argparse.Namespace) -> str | None:
    """Makes the folder and looks for the models; why that cannot be, None if it can."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.models is not None:
            offer_models(options.models, options.out / "work" / "models-seen")
    except OSError as error:
        return f"--out: cannot write to {options.out} ({error.strerror}): name another folder"
    except SetupError as error:
        return str(error)
    return None


def announce(legs: Sequence[Leg], *, is_rehearsal: bool) -> None:
    """Says what comes and how long it takes."""
    to_run = [leg for leg in legs if not campaign.left_out(leg, is_rehearsal=is_rehearsal)]
    if is_rehearsal:
        print("A rehearsal measures no card. It cannot try:")
        print("\n".join(f"  - {what}" for what in catalogue.NOT_REHEARSED))
    if not to_run:
        print("Everything is measured: name a new --out to measure again.")
        return
    print("To do:" if is_rehearsal else "To do (approximate time on a fast card):")
    for leg in to_run:
        print(f"  {leg.title}" + ("" if is_rehearsal else f": {leg.seconds:.0f} s"))
    if not is_rehearsal:
        print(f"Together {sum(leg.seconds for leg in to_run) / 60:.0f} minutes.")
        if driver.total_bytes() is None:
            print("No driver answers (nvidia-ml-py): whole runs will have no peak.", flush=True)


def no_card() -> str | None:
    """Why no card can be measured here; None if one can."""
    import torch

    if torch.cuda.is_available():
        return None
    built = "" if torch.backends.cuda.is_built() else " is built without CUDA and"
    return (
        f"not measured: torch {torch.__version__}{built} finds no NVIDIA card "
        "(`nvidia-smi` shows the driver; --rehearse tries the parts on the CPU)"
    )


def other_rows(options: argparse.Namespace) -> str | None:
    """Why rows of this call must not go to the folder's; None if they may."""
    found = rows.read(options.out / "rows.jsonl")
    here = None if options.rehearse else driver.device_name()
    facts = {
        "weights": ("other weights", rows.weights_of(options.models)),
        "device": ("another card", here),
    }
    for name, (what, wanted) in facts.items():
        others = {row[name] for row in found if row.get(name)} - {wanted}
        if wanted is not None and others:
            return (
                f"{options.out} holds rows of {what} ({', '.join(sorted(others))}, not "
                f"{wanted}): name a new --out"
            )
    return None


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    if not options.rehearse and (reason := no_card()):
        print(f"bench card: {reason}")
        return 0
    if reason := prepare(options) or other_rows(options):
        print(f"bench card: {reason}", file=sys.stderr)
        return 2
    legs = catalogue.legs(options.part, options.gib)
    announce(campaign.left_to_do(options.out, legs), is_rehearsal=options.rehearse)
    minutes = options.minutes or (REHEARSAL_MINUTES if options.rehearse else MINUTES)
    settings = campaign.Campaign(
        options.out, options.host, options.models, minutes, options.rehearse
    )
    is_interrupted = False
    try:
        campaign.run(settings, legs)
    except KeyboardInterrupt:
        is_interrupted = True
        print("\nInterrupted.", file=sys.stderr)
    return finish(options.out, legs, is_rehearsal=options.rehearse, is_interrupted=is_interrupted)


def finish(folder: Path, legs: Sequence[Leg], *, is_rehearsal: bool, is_interrupted: bool) -> int:
    """Makes the plot and the report of what is there, and says what is left; the exit code."""
    if not (folder / "rows.jsonl").exists():
        return 130 if is_interrupted else 1
    plot.draw(folder)
    summary = report.write(folder)
    models = folder / "work" / "models"
    taken = sum(path.stat().st_size for path in models.rglob("*") if path.is_file())
    if taken > GIB:
        print(f"{models} holds {taken / GIB:.0f} GiB of random weights: delete it when done.")
    print(f"\n{summary}\n\nReport: {folder / report.NAME}")
    how = campaign.ends(folder)
    failed = [leg for leg in legs if how.get((leg.part, leg.name), ("",))[0] == campaign.FAILED]
    left = len(campaign.left_to_do(folder, legs)) - len(failed)
    if left:
        print(f"{left} of {len(legs)} legs are left: run the same command again.")
    if failed:
        titles = ", ".join(leg.title for leg in failed)
        print(f"Not whole: {titles} (see the report's errors; the same command tries again).")
    if not left and not failed:
        form = 'the issue form "Report of a card" takes report, plot and rows.jsonl'
        print("Finished." if is_rehearsal else f"Finished: {form}.")
    return 130 if is_interrupted else 1 if failed else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C: the leg's processes are ended first
    sys.exit(main(sys.argv[1:]))
