"""The rows of a campaign: each is on disk the moment it is measured. Standard library only."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .job import Job
from .listening import heard

Row = dict[str, Any]
OUT_OF_MEMORY = "out of memory"
NOT_MEASURED = "not measured"  # how the error of a row begins that we gave up ourselves
# Errors after which a process can use the card no more.
_STICKY = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS_EXECUTION_FAILED", re.IGNORECASE)
_PATH = re.compile(r"(?:[A-Za-z]:)?(?:[\\/][\w.+@~-]+)+[\\/]([\w.+@~-]+)")
_LONGEST = 300
# Names of environment variables with folders that no row may name; the campaign sets the first.
HIDDEN = ("ZIMAGE_HIDDEN_DIRS", "ZIMAGE_HOST_DIR")


class NotMeasuredError(Exception):
    """Something that cannot be measured here and is no fault: its leg is not tried again."""


def read(path: Path) -> list[Row]:
    """All rows; a last line that was cut by a kill is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, row: Row) -> None:
    """Adds a row and waits until the disk has it; ends a line that a kill has cut before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def without_paths(text: str) -> str:
    """One line, short, with the names of files instead of their paths.

    Folders that we know are taken out first, for a name in them may hold a space.
    """
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    named = [part for name in HIDDEN for part in os.environ.get(name, "").split(os.pathsep)]
    known = [*named, str(Path.cwd()), sys.prefix, tempfile.gettempdir(), str(Path.home())]
    for folder in sorted({place for place in known if len(place) > 1}, key=len, reverse=True):
        line = line.replace(folder, "/~/~")
    return _PATH.sub(r"\1", line)[:_LONGEST]


def error_text(error: BaseException) -> str:
    """What a row says of an error; the driver's own out of memory has another class."""
    is_oom = type(error).__name__ == "OutOfMemoryError" or "CUDA error: out of memory" in str(error)
    kind = NOT_MEASURED if isinstance(error, NotMeasuredError) else type(error).__name__
    return OUT_OF_MEMORY if is_oom else without_paths(f"{kind}: {error}")


class Recorder:
    """Writes the rows of one leg.

    facts: what every row says of the machine and the versions; `host.start` fills it.
    notes: what was logged so far while the current row is measured, see `listening`.
    failures: rows with an error that is no result; running out of memory is one.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        leg = job.leg
        self.notes: list[str] = []
        self.failures = 0
        self.facts: Row = {
            "part": leg.part, "leg": leg.name, "run": job.run, "rehearsal": job.is_rehearsal,
            "pack": job.pack, "weights": weights_of(job.models_dir), "card_gib": leg.card_gib,
        }  # fmt: skip
        self._known = {
            self._key(row)
            for row in read(job.rows_path)
            if (row["part"], row["leg"]) == (leg.part, leg.name) and row.get("error") is None
        }

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return row.get("case"), row.get("variant"), row.get("round")

    def has(self, case: str, variant: str, round_: int = 0) -> bool:
        """Whether such a row was measured without an error, now or before an interruption."""
        return (case, variant, round_) in self._known

    def turns(
        self, case: str, variants: Iterable[str], rounds: Iterable[int]
    ) -> Iterator[tuple[int, str]]:
        """Yields round and variant of what is to be measured now, one after the other.

        A round with a missing row is repeated whole, since its rows are compared with each other. A
        variant whose row has an error gets no more turns.
        """
        names, failed = tuple(variants), set()
        for round_ in rounds:
            if all(self.has(case, name, round_) for name in names):
                continue
            for name in names:
                if name not in failed:
                    yield round_, name
                    failed |= set() if self.has(case, name, round_) else {name}

    def write(self, case: str, variant: str, round_: int = 0, **figures: Any) -> Row:
        """Appends a row and says so.

        Args:
            case: what is computed, a picture's size above all.
            variant: which way; "ComfyUI" is the host alone.
            round_: 0, 1, ...; variants of one round are compared with each other.
            figures: bytes, seconds, counts; None for what was not measured.
        """
        row = {**self.facts, "case": case, "variant": variant, "round": round_, "error": None}
        row |= figures
        append(self._job.rows_path, row)
        change = self._known.add if row["error"] is None else self._known.discard
        change(self._key(row))
        self.failures += not is_result(row)
        shown = (
            _shown(name, value)
            for name, value in figures.items()
            if value is not None and not isinstance(value, str | list)
        )
        said = row["error"] or ", ".join(shown)
        print(f"  {case} | {variant} | {said}"[:200], flush=True)
        return row

    @contextmanager
    def attempt(self, case: str, variant: str, round_: int = 0) -> Iterator[Row]:
        """Yields the figures of a row, and writes it at the end; an error becomes the row's.

        Raises:
            RuntimeError: the card cannot be used any more in this process.
        """
        figures: Row = {}
        with heard(without_paths) as self.notes:
            try:
                yield figures
            except Exception as error:
                text = error_text(error)
                self.write(case, variant, round_, **self._noted({**figures, "error": text}))
                if _STICKY.search(str(error)) and text != OUT_OF_MEMORY:
                    raise
            else:
                self.write(case, variant, round_, **self._noted(figures))

    def _noted(self, figures: Row) -> Row:
        """The figures with what was logged in front of their own note."""
        notes = [*self.notes, *filter(None, [figures.get("note")])]
        return {**figures, "note": "; ".join(dict.fromkeys(notes)) or None}


def is_result(row: Row) -> bool:
    """Whether a row says what the card did; else its leg is tried again."""
    error = row["error"]
    known = (OUT_OF_MEMORY, NOT_MEASURED)
    return error is None or row.get("survived") is not None or error.startswith(known)


def weights_of(models_dir: Path | None) -> str:
    """What a row says of the weights."""
    return "random" if models_dir is None else "real"


def _shown(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name[:-6]} {value / 2**20:.1f} MiB"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
