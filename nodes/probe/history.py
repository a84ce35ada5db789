"""Records as rows of a JSON lines file, to compare them later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .record import Figure, Record


def row(
    record: Record, *, time: str, figures: Sequence[Figure], about: Mapping[str, Any]
) -> dict[str, Any]:
    """One record as a flat row.

    Args:
        time: when, ISO 8601.
        figures: what else the machine reports at that moment.
        about: workflow hash, model, size, batch, dtype and versions, where they are known.
    """
    parts = record.parts_at_peak
    seconds = [step.seconds for step in record.steps]
    return {
        "time": time,
        "label": record.label,
        "state": record.state,
        "peak_bytes": record.peak_bytes,
        "is_at_least": record.is_at_least,
        "weights_bytes": None if parts is None else parts.weights,
        "activations_bytes": None if parts is None else parts.activations,
        "other_bytes": None if parts is None else parts.other,
        "steps": len(seconds),
        "seconds_per_step": sum(seconds) / len(seconds) if seconds else None,
        "mode": record.mode,
        "detail": record.detail,
        "measured_with": record.measured_with,
        "device": record.device.name,
        "device_bytes": record.device.total_bytes,
        "allocator": record.device.allocator,
        **about,
        "figures": {f.name: f.bytes for f in figures if f.bytes is not None},
    }


def append(path: Path, entry: Mapping[str, Any]) -> None:
    """Appends a row; makes the folder.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(dict(entry), ensure_ascii=False)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def workflow_hash(prompt: Any) -> str:
    """A short hash of a workflow, the same for the same nodes, wires and settings."""
    text = json.dumps(prompt, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
