"""A record as text: a table, one line for a summary, a block for an issue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..units import size
from ..words import Words
from .record import Device, Figure, Moment, Parts, Record

_STATES = {
    "running": Words("stillRunning", "still running"),
    "done": "",
    "interrupted": Words("interruptedThere", "interrupted: the record ends there"),
    "failed": Words("failedThere", "failed: the record ends there"),
    "cached": Words("cached", "cached, not measured"),
}
_PEAKS = {
    "running": "Peak so far",
    "interrupted": "Peak until then",
    "failed": "Peak until then",
}


def headline(record: Record) -> Words:
    """One line: label, peak, and what it was made of."""
    name = record.label or Words("node", "VRAM Probe")
    state = _STATES[record.state]
    if record.peak_bytes is None:
        told = state or Words("nothingYet", "nothing measured yet")
        return Words("lineOf", "$1: $2", name, told)
    line = Words("linePeak", "$1: peak $2", name, _peak(record))
    if record.parts_at_peak is not None:
        line = Words("lineParts", "$1 ($2)", line, _parts(record.parts_at_peak))
    return Words("lineState", "$1, $2", line, state) if state else line


def meaning(record: Record) -> str:
    """What the peak means against the card, in one sentence; empty where nothing was measured.

    js/probe/headline.js says the same in the page's language. An allocator does not count the
    driver's own memory, so what is left is not called free.
    """
    if record.peak_bytes is None:
        return ""
    start = f"{_PEAKS.get(record.state, 'Peak')} {_peak(record)}"
    device, is_process = record.device, record.measured_with.startswith("RAM of the process")
    if is_process:
        why = "no GPU was used" if device.type == "cpu" else "this GPU shares it"
        return f"{start} of RAM, for all of ComfyUI: {why}."
    if device.type == "cpu":
        return f"{start} of tensors, in RAM: no GPU was used."
    if not device.total_bytes:
        return f"{start}. The size of the card is not known."
    left = device.total_bytes - record.peak_bytes
    if left < 0:
        return f"{start}: that is {size(-left)} more than the card's {size(device.total_bytes)}."
    most = "at most " if record.is_at_least else ""
    return (
        f"{start} of {size(device.total_bytes)}: {most}{size(left)} left for the driver and other "
        "programs."
    )


def report(record: Record) -> str:
    """The whole record as lines of text."""
    device = record.device
    lines = [str(headline(record))]
    if record.peak_bytes is not None:
        lines.append(meaning(record))
    if record.peak_at is not None:
        lines.append(f"peak at {_moment(record.peak_at)}")
    total = "" if device.total_bytes is None else f" with {size(device.total_bytes)}"
    allocator = "" if device.allocator is None else f", allocator {device.allocator}"
    lines += [
        f"device: {device.name}{total}{allocator}",
        f"measured with: {record.measured_with}; mode {record.mode}, detail {record.detail}",
    ]
    if record.steps:
        lines += ["", "step   seconds        peak"]
        lines += [f"{s.step:4d} {s.seconds:9.3f} {size(s.peak_bytes):>11}" for s in record.steps]
    if record.largest:
        lines += ["", "largest tensors alive at the peak:"]
        lines += [
            f"{size(t.bytes):>11}  {_shape(t.shape)} {t.dtype}  {t.where}".rstrip()
            for t in record.largest
        ]
    if record.figures:
        lines += ["", *(f"{figure.name}: {_amount(figure)}" for figure in record.figures)]
    if len(record.summary) > 1:
        lines += ["", "all probes of this run, in order:", *record.summary]
    if record.notes or record.files:
        lines += ["", *(f"note: {note}" for note in record.notes)]
        lines += [f"written: {name}" for name in record.files]
    return "\n".join(lines)


def issue_report(record: Record, versions: Mapping[str, str]) -> str:
    """A Markdown block for a bug report: figures, versions and settings; no paths, no prompts.

    Args:
        record: the label is left out, as people write their prompts into it.
        versions: name and version of what runs: host, torch, python, ...
    """
    device = record.device
    rows = [("peak", _peak(record)), ("state", str(record.state))]
    if record.parts_at_peak is not None:
        rows.append(("made of", _parts(record.parts_at_peak)))
    if record.peak_at is not None:
        rows.append(("peak at", _moment(record.peak_at)))
    rows += [
        ("device", f"{device.name}, {size(device.total_bytes)}"),
        ("allocator", device.allocator or "none"),
        ("measured with", record.measured_with),
        ("settings", f"mode {record.mode}, detail {record.detail}"),
        ("steps", _steps(record)),
    ]
    rows += [(figure.name, _amount(figure)) for figure in record.figures]
    rows += list(versions.items())
    cells = ((name, value.replace("|", "/").replace("\n", " ")) for name, value in rows)
    table = "\n".join(f"| {name} | {value} |" for name, value in cells)
    return f"**VRAM report**\n\n| | |\n|---|---|\n{table}\n"


def completed(
    record: Record,
    figures: Iterable[Figure],
    others: Sequence[Record],
    versions: Mapping[str, str],
) -> Record:
    """The record with figures, the summary of its prompt, and both reports.

    Args:
        figures: of this moment.
        others: the prompt's other probes so far, in order.
        versions: as for `issue_report`.
    """
    probes = enumerate([*others, record], 1)
    summary = tuple(Words("lineNumber", "$1. $2", i, headline(one)) for i, one in probes)
    record = replace(record, figures=tuple(figures), summary=summary)
    return replace(record, report=report(record), issue_report=issue_report(record, versions))


def missed(label: str) -> Record:
    """The record of a probe that the host took from its cache."""
    return Record(label, "cached", "", "totals", Device("", "", None, None), "")


def _peak(record: Record) -> str:
    peak = size(record.peak_bytes)
    return Words("atLeast", "at least $1", peak) if record.is_at_least else peak


def _amount(figure: Figure) -> str:
    return f"not available: {figure.reason}" if figure.bytes is None else size(figure.bytes)


def _parts(parts: Parts) -> Words:
    sizes = map(size, (parts.weights, parts.activations, parts.other))
    return Words("parts", "weights $1, activations $2, other $3", *sizes)


def _moment(at: Moment) -> str:
    named = [
        None if at.step is None else f"step {at.step}",
        at.block,
        None if at.operation is None else f"operation {at.operation}",
        f"{at.t_s:.2f} s",
    ]
    return ", ".join(part for part in named if part)


def _steps(record: Record) -> str:
    if not record.steps:
        return "none"
    mean = sum(s.seconds for s in record.steps) / len(record.steps)
    return f"{len(record.steps)}, {mean:.3f} s each on average"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
