"""One sampling as a probe sees it: readings by step and by block, and the record at the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from ..base import device as loaded
from . import events as probe_events
from . import files as probe_files
from . import prompt as probe_prompt
from .settings import ProbeSettings
from .streaming import Streaming

logger = logging.getLogger(__name__)

_LARGEST = 5
_TRACKED = "exact tensor bytes (every operation is watched), and the weights on the device"


class SamplingRun:
    """Reads memory at the moments that the wrappers name.

    Args:
        settings: what the user asked.
        watch: the prompt's.
        patcher: of the model that is sampled.
        recorder: gets the readings.
        about: model, size, batch and dtype, for the history.
        outlet: sends the records.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        watch: probe_prompt.PromptWatch,
        patcher: Any,
        recorder: Any,
        about: dict[str, Any],
        outlet: probe_events.Outlet,
    ) -> None:
        self._settings = settings
        self._watch = watch
        device = self._device = patcher.load_device
        self._streaming = Streaming(patcher)
        self._recorder = recorder
        self._about = about
        self._place = probe_events.place_of(settings.node_id)
        self._outlet = outlet
        self._interval = watch.counter(device).open(set_back=settings.sets_back)
        self._whole = watch.counter(device).open(set_back=False)
        self._before = max(0, self._interval.current - loaded.weights_bytes(device))
        self._are_steps_exact = True
        self._tracker: Any = None
        # On a CPU there is no allocator to ask, so the operations themselves are counted.
        self._is_tracked = settings.sees_blocks and device.type == "cpu"
        self._thread = threading.get_ident()
        recorder.samplings += 1
        if recorder.samplings > 1:
            recorder.note(
                f"sampled {recorder.samplings} times in this prompt: steps are counted on"
            )
        if self._is_tracked:
            recorder.blank = replace(recorder.blank, measured_with=_TRACKED)
            self._publish("running")
        else:
            self.point("before the sampling")

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Around the sampler: what comes before it was loading."""
        with ExitStack() as until:
            tools, names = self._settings.tools, self._settings.detail == "allocations"
            if self._is_tracked or names:
                self._tracker = tools.tracker(trace=names, log=names, device=self._device.type)
                until.callback(self._end_tracking)
                until.enter_context(self._tracker)
            if names:
                told = (self._device, self._recorder, self._tracker, tools)
                until.enter_context(probe_files.memory_history(*told))
            self.point("loading", opens_step=True)
            self._begin_step()
            yield
            self._recorder.drop_step()
            self.point("after the last step")

    def step_ended(self) -> None:
        """The sampler has ended a step."""
        self.point("sampler" if self._settings.sees_blocks else None)
        self._recorder.end_step()
        self._streaming.end_step()
        self._begin_step()

    def _begin_step(self) -> None:
        self._streaming.begin_step()
        self._recorder.begin_step()

    def point(self, block: str | None, *, opens_step: bool = False) -> None:
        """Reads the highest since the last point; calls from other GPUs' threads are left out.

        Args:
            block: what has just ended.
            opens_step: a step comes next, so that its peak is not to be hidden by a higher one.
        """
        if threading.get_ident() != self._thread:
            return
        recorder, tools = self._recorder, self._settings.tools
        self._streaming.read()
        weights = loaded.weights_bytes(self._device)
        if self._is_tracked:
            if self._tracker is None:
                return
            parts = tools.parts_of(weights + self._tracker.peak_bytes, weights, 0)
        else:
            is_in_step = self._settings.sees_steps and recorder.step is not None
            opens_step = self._settings.sees_steps and opens_step
            high = self._interval.take(set_back=is_in_step or opens_step)
            if is_in_step:
                self._are_steps_exact = self._are_steps_exact and high.is_exact
            # What was there before and is gone by now hides no activations.
            self._before = min(self._before, max(0, self._interval.current - weights))
            parts = tools.parts_of(high.bytes, weights, self._before)
        operation = None if self._tracker is None else self._tracker.peak_op or None
        is_peak = recorder.point(parts, block=block, operation=operation)
        if self._tracker is not None:
            if is_peak and self._settings.detail == "allocations":
                recorder.largest = _largest(self._tracker.peak_live, tools)
            self._tracker.restart_peak()
        self._publish("running")

    def end(self, state: str) -> None:
        """Ends the run: the last record goes to the page, the output and the history."""
        recorder, settings = self._recorder, self._settings
        if state != "done" and not self._is_tracked:
            self.point(None)
        recorder.drop_step()
        is_exact = self._whole.take(set_back=False).is_exact and self._are_steps_exact
        if not self._is_tracked and not is_exact:
            recorder.note(probe_prompt.AT_LEAST)
        self._interval.close()
        self._whole.close()
        device = self._device
        streamed = None if device.type == "cpu" else tuple(self._streaming.figures())
        if settings.is_kept:
            seen = recorder.record(state)
            probe_files.keep(recorder, seen, settings, self._about, device, streamed)
        seen = self._shown(recorder.record(state))
        record = probe_prompt.completed(self._watch, device, settings, seen, streamed)
        self._watch.put(settings.node_id, record)
        self._show(record)
        # What comes next, such as the decode, is not the sampling's.
        self._watch.begin_stretch(self._device, settings)
        logger.info("VRAM Probe: %s", record.report.splitlines()[0])

    def _publish(self, state: str) -> None:
        if self._outlet.is_open():
            self._show(self._shown(self._recorder.record(state)))

    def _show(self, record: Any) -> None:
        whole = record.as_json()
        self._settings.live.update(whole)
        self._watch.show(self._place, whole, self._outlet.send)

    def _shown(self, record: Any) -> Any:
        """Steps have peaks of their own only where the counter was set back between them."""
        return record if self._settings.sees_steps else replace(record, steps=())

    def _end_tracking(self) -> None:
        if self._is_tracked:
            self.point(None)  # what a fault has cut off
        self._tracker = None


def _largest(live: Any, tools: Any) -> tuple[Any, ...]:
    first = sorted(live, key=lambda a: a.nbytes, reverse=True)[:_LARGEST]
    return tuple(
        tools.tensor(a.nbytes, a.shape, str(a.dtype).removeprefix("torch."), a.where) for a in first
    )
