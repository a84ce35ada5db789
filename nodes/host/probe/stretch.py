"""What ran between the last probe and this one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from . import device as probe_device
from . import events as probe_events
from . import files as probe_files
from . import prompt as probe_prompt
from .settings import RESET_ONLY, ProbeSettings

_RESET = "the peak was set back, nothing was measured"
_CANNOT_RESET = "nothing was measured, and the peak of this device cannot be set back"


def measure(value: Any, settings: ProbeSettings) -> Any:
    """Ends the stretch before a probe and returns its record; mode reset only measures nothing.

    Args:
        value: what travels on the wire; its model's device is the one that is read.
        settings: what the user asked.
    """
    watch = probe_prompt.current(settings.tools)
    device = probe_device.device_of(value)
    if settings.mode == RESET_ONLY:
        can = probe_device.gauge_of(device).set_back is not None
        record = probe_prompt.blank_record(watch, device, settings)
        record = replace(record, state="done", notes=(_RESET if can else _CANNOT_RESET,))
        return probe_prompt.completed(watch, device, settings, record)
    record, recorder = watch.end_stretch(device, settings)
    if settings.is_kept and record.state == "done":
        about = probe_files.about_value(value)
        probe_files.keep(recorder, record, settings, about, device)
        record = recorder.record("done")
    record = probe_prompt.completed(watch, device, settings, record)
    watch.put(settings.node_id, record)
    watch.show(probe_events.place_of(settings.node_id), record.as_json())
    return record


def begin(value: Any, settings: ProbeSettings) -> None:
    """Begins the stretch behind a probe, when the probe itself has done its work."""
    watch = probe_prompt.current(settings.tools)
    watch.begin_stretch(probe_device.device_of(value), settings)
