"""What ran between the last probe and this one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...probe.record import Record
from ...words import Words
from .device import device_of, gauge_of
from .events import place_of, send
from .files import about_value, keep
from .prompt import current
from .settings import RESET_ONLY, ProbeSettings

_RESET = Words("reset", "the peak was reset; nothing was measured")
_CANNOT_RESET = Words(
    "cannotReset", "nothing was measured, and the peak of this device cannot be reset"
)


def measure(value: Any, settings: ProbeSettings) -> Record:
    """Ends the interval before a probe and returns its record; mode reset only measures nothing.

    The device that is read is that of the value's model.
    """
    probes = current()
    device = device_of(value)
    if settings.mode == RESET_ONLY:
        note = _CANNOT_RESET if gauge_of(device).reset is None else _RESET
        record = replace(probes.blank_record(device, settings), state="done", notes=(note,))
        return probes.completed(record, device, settings)
    record, recorder = probes.end_interval(device, settings)
    if settings.is_kept and record.state == "done":
        keep(recorder, record, about_value(value), device)
        record = recorder.record("done")
    record = probes.completed(record, device, settings)
    probes.put(settings.node_id, record)
    probes.show(place_of(settings.node_id), record.as_json(), send)
    return record


def begin(value: Any, settings: ProbeSettings) -> None:
    """Begins the interval behind a probe, when the probe itself has done its work."""
    current().begin_interval(device_of(value), settings)
