"""What is measured in which process: pictures, legs, and what a leg is told. Standard library."""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

Mode = Literal["dynamic", "estimate"]
Allocator = Literal["cudaMallocAsync", "native"]
# Environment variables that torch's allocator reads; the first is the one that the host knows.
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class Picture(NamedTuple):
    """A batch of pictures, sides in pixels."""

    width_px: int
    height_px: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}x{self.batch}"


def picture(text: str) -> Picture:
    """ "1024x1024x1" as a picture."""
    return Picture(*(int(side) for side in text.split("x")))


@dataclass(frozen=True)
class Leg:
    """A part of the campaign, or one of its pieces, that runs in a process of its own.

    part: the name that `--part` takes.
    name: of the piece; tells legs of one part apart.
    seconds: what it takes on a fast card, about; for the announcement and for `--minutes`.
    limit_s: after so many seconds it is ended.
    mode: how the host manages weights: dynamic VRAM, or loading by estimate.
    allocator: torch's, on the card.
    card_gib: imitates a card of so many GiB by ballast; None for the card as it is.
    needs_card: why it cannot be rehearsed on the CPU; empty if it can.
    reads: parts whose rows it reads; it runs again once they have new rows.
    module: holds `run(job, rows)`; empty for `benchmarks.card.parts.<part>`.
    """

    part: str
    name: str = "all"
    seconds: float = 60.0
    limit_s: float = 240.0
    mode: Mode = "dynamic"
    allocator: Allocator = "cudaMallocAsync"
    card_gib: float | None = None
    needs_card: str = ""
    reads: tuple[str, ...] = ()
    module: str = ""

    @property
    def title(self) -> str:
        return self.part if self.name == "all" else f"{self.part} ({self.name})"


@dataclass(frozen=True)
class Job:
    """What the process of a leg is told.

    leg: which.
    folder: of the campaign; everything that is written lies below it.
    host_dir: an unpacked ComfyUI.
    models_dir: real weights; None for random ones.
    is_rehearsal: tiny models on the CPU instead of the true sizes on the card.
    deadline: seconds since the epoch at which the process is ended.
    run: names this start of the campaign; rows of one round are compared within a run alone.
    pack: version and commit of this project.
    """

    leg: Leg
    folder: Path
    host_dir: Path
    models_dir: Path | None = None
    is_rehearsal: bool = False
    deadline: float = float("inf")
    run: str = ""
    pack: str = ""

    @property
    def rows_path(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def work(self) -> Path:
        """For files that are no result: models, a host's base directory, logs."""
        return self.folder / "work"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def to_json(self) -> str:
        told = dataclasses.asdict(self)
        return json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in told.items()})


def from_json(text: str) -> Job:
    told = json.loads(text)
    paths = {name: Path(told[name]) for name in ("folder", "host_dir")}
    models = told["models_dir"] and Path(told["models_dir"])
    leg = Leg(**{**told["leg"], "reads": tuple(told["leg"]["reads"])})
    return Job(**{**told, **paths, "models_dir": models, "leg": leg})
