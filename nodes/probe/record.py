"""What a VRAM Probe has measured, as plain data: for the page, the output and the report.

A record never changes; a probe that is still measuring makes a new one for each event. `as_json`
gives plain dicts, lists, numbers, strings and None. Nothing in it names a folder or a prompt.

| unit | of |
|---|---|
| bytes | `*_bytes`, `weights`, `activations`, `other`; never rounded |
| seconds | `*_s`, `seconds`, since the probe began to measure |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from ..words import words_in

VERSION = 1

State = Literal["running", "done", "interrupted", "failed", "cached"]
Detail = Literal["totals", "steps", "blocks", "allocations"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A named number of bytes, or the reason why this machine cannot give it.

    name: such as ``torch allocated`` or ``driver used on the device``.
    bytes: None where the number is not available.
    reason: None where it is available.
    """

    name: str
    bytes: int | None
    reason: str | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.reason is None):
            raise ValueError(
                f"{self.name} must have bytes or a reason, got {self.bytes}, {self.reason!r}"
            )


@dataclass(frozen=True, slots=True)
class Device:
    """Where it was measured.

    name: such as the card's name, or ``cpu``.
    type: torch's: cpu, cuda, mps, ...
    total_bytes: of the card or of the RAM.
    allocator: such as ``native``, ``native, expandable segments`` or ``cudaMallocAsync``; None on
        a cpu.
    """

    name: str
    type: str
    total_bytes: int | None
    allocator: str | None


@dataclass(frozen=True, slots=True)
class Moment:
    """When the peak was reached; what is not known is None.

    t_s: seconds since the probe began.
    step: sampling step, the first is 1.
    block: such as ``layers.12``, or ``before the blocks``.
    operation: such as ``aten.mm.default``; the tracker knows it, an allocator's counter does not.
    """

    t_s: float
    step: int | None = None
    block: str | None = None
    operation: str | None = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What a number of bytes is made of; the three add up to it.

    weights: weights of models on the device.
    activations: what was added while the probe measured.
    other: the rest: what was there before, and on a CPU the process itself.
    """

    weights: int
    activations: int
    other: int

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.other


@dataclass(frozen=True, slots=True)
class Sample:
    """One point of the timeline: the highest moment since the point before."""

    t_s: float
    parts: Parts
    step: int | None = None
    block: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One sampling step.

    step: the first is 1.
    peak_bytes: highest total in this step.
    """

    step: int
    start_s: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor that was alive at the peak.

    where: code line that made it, ``file.py:line function``; empty if not known.
    """

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    where: str


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that a probe reports.

    state: ``cached``: what is before the probe came from the host's cache; nothing was measured.
    mode, detail: the node's settings.
    measured_with: what gave the bytes, for a reader: ``torch allocator``, ``process RSS``, ...
    peak_bytes: None where nothing was measured.
    is_at_least: a higher peak may have passed between two readings.
    timeline: at most 400 points, the peak among them.
    figures: what else this machine reports, or why it cannot.
    largest: the largest live tensors at the peak, in detail ``allocations``.
    report: the table for people; issue_report: Markdown without paths or prompts.
    summary: one line for each probe of the prompt so far, in order of execution.
    notes: what did not go as asked, such as a folder that cannot be written.
    files: names of files below the host's output folder that this probe wrote.
    prompt_id: of the prompt in which it was measured. A probe that the host took from its cache
        still carries the record, and the id, of the prompt before.
    """

    label: str
    state: State
    mode: str
    detail: Detail
    device: Device
    measured_with: str
    peak_bytes: int | None = None
    is_at_least: bool = False
    peak_at: Moment | None = None
    parts_at_peak: Parts | None = None
    timeline: tuple[Sample, ...] = ()
    steps: tuple[Step, ...] = ()
    figures: tuple[Figure, ...] = ()
    largest: tuple[LiveTensor, ...] = ()
    report: str = ""
    issue_report: str = ""
    summary: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    prompt_id: str = ""

    def as_json(self) -> dict[str, Any]:
        """Returns the form in which the page and the history get it.

        ``timeline`` rows are ``[t_s, weights, activations, other, step, block]``. ``peak_at`` and
        ``parts_at_peak`` are None where nothing was measured. ``words`` tells the page how to say
        the record's texts in its own language, see `words_in`.
        """
        timeline = [
            [round(s.t_s, 4), s.parts.weights, s.parts.activations, s.parts.other, s.step, s.block]
            for s in self.timeline
        ]
        rest = asdict(replace(self, timeline=()), dict_factory=_with_lists)
        blocks = dict.fromkeys(sample.block for sample in self.timeline)  # few, and many samples
        words = words_in([rest, *blocks])
        return {"version": VERSION, **rest, "timeline": timeline, "words": words}


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of a dataclass' fields, its tuples as lists, as in JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}
