"""One sampling as a probe sees it: readings by step and by block, and the record at the end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...probe.record import LiveTensor, Record, State
from ...probe.recorder import Recorder, parts_of
from ...probe.tracker import Allocation, PeakTracker
from ...words import Words
from ..base.device import allocator_weights_bytes, weights_bytes
from .events import Sender, place_of
from .files import keep, memory_history
from .prompt import AT_LEAST, current
from .settings import ProbeSettings
from .streaming import Streaming

logger = logging.getLogger(__name__)

_LARGEST = 5
_TRACKED = Words(
    "tracked", "exact tensor bytes (every operation is watched), and the weights on the device"
)


class Sampling:
    """Reads memory at the moments that the wrappers name.

    about: model, size, batch and dtype, for the history.
    """

    def __init__(
        self,
        settings: ProbeSettings,
        patcher: Any,
        recorder: Recorder,
        about: dict[str, Any],
        sender: Sender,
    ) -> None:
        self._settings, self._recorder = settings, recorder
        self._about, self._sender = about, sender
        self._probes = current()
        self._device: torch.device = patcher.load_device
        self._streaming = Streaming(patcher)
        self._place = place_of(settings.node_id)
        counter = self._probes.counter(self._device)
        self._part, self._whole = counter.open(reset=settings.resets), counter.open(reset=False)
        weights = allocator_weights_bytes(self._device)
        self._before = max(0, self._part.now.current - weights)
        self._are_steps_exact = True
        self._tracker: PeakTracker | None = None
        # On a CPU there is no allocator to ask, so the operations themselves are counted.
        self._is_tracked = settings.sees_blocks and self._device.type == "cpu"
        self._thread = threading.get_ident()
        recorder.samplings += 1
        if recorder.samplings > 1:
            recorder.note(
                Words(
                    "sampledAgain",
                    "sampled $1 times in this run: steps are numbered on",
                    recorder.samplings,
                )
            )
        if self._is_tracked:
            recorder.blank = replace(recorder.blank, measured_with=_TRACKED)
            self._publish()
        else:
            self.point(Words("beforeSampling", "before the sampling"))

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Around the sampler: what comes before it was loading."""
        with ExitStack() as until:
            names = self._settings.detail == "allocations"
            if self._is_tracked or names:
                tracker = PeakTracker(trace=names, log=names, device=self._device.type)
                self._tracker = tracker
                until.callback(self._end_tracking)
                until.enter_context(tracker)
                if names:
                    until.enter_context(memory_history(self._device, self._recorder, tracker))
            self.point(Words("loading", "loading"), opens_step=True)
            self._begin_step()
            yield
            self._recorder.drop_step()
            self.point(Words("afterLastStep", "after the last step"))

    def step_ended(self) -> None:
        """The sampler has ended a step."""
        self.point(Words("sampler", "sampler") if self._settings.sees_blocks else None)
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
            opens_step: a step comes next; a higher peak from before must not hide its own.
        """
        if threading.get_ident() != self._thread:
            return
        recorder, tracker = self._recorder, self._tracker
        self._streaming.read()
        if self._is_tracked:
            if tracker is None:
                return
            weights = weights_bytes(self._device)
            parts = parts_of(weights + tracker.peak_bytes, weights, 0)
        else:
            is_in_step = self._settings.sees_steps and recorder.step is not None
            opens_step = self._settings.sees_steps and opens_step
            high = self._part.take(reset=is_in_step or opens_step)
            if is_in_step:
                self._are_steps_exact = self._are_steps_exact and high.is_exact
            # What was there before and is gone by now hides no activations.
            weights = allocator_weights_bytes(self._device)
            self._before = min(self._before, max(0, self._part.now.current - weights))
            parts = parts_of(high.bytes, high.beside_bytes + weights, self._before)
        operation = None if tracker is None else tracker.peak_op or None
        is_peak = recorder.point(parts, block=block, operation=operation)
        if tracker is not None:
            if is_peak and self._settings.detail == "allocations":
                recorder.largest = _largest(tracker.peak_live)
            tracker.restart_peak()
        self._publish()

    def end(self, state: State) -> None:
        """Ends it: the last record goes to the page, the node's output and the history."""
        recorder, settings, device = self._recorder, self._settings, self._device
        if state != "done" and not self._is_tracked:
            self.point(None)
        recorder.drop_step()
        is_exact = self._is_tracked or self._whole.take(reset=False).is_exact
        recorder.is_at_least = recorder.is_at_least or not is_exact
        if not self._is_tracked and not (is_exact and self._are_steps_exact):
            recorder.note(AT_LEAST)
        self._part.close()
        self._whole.close()
        streamed = None if device.type == "cpu" else tuple(self._streaming.figures())
        if settings.is_kept:
            keep(recorder, recorder.record(state), self._about, device, streamed)
        seen = self._shown(recorder.record(state))
        record = self._probes.completed(seen, device, settings, streamed)
        self._probes.put(settings.node_id, record)
        self._show(record)
        # What comes next, such as the decode, is not the sampling's.
        self._probes.begin_interval(device, settings)
        logger.info("VRAM Probe: %s", record.report.splitlines()[0])

    def _publish(self) -> None:
        if self._sender.is_open():
            self._show(self._shown(self._recorder.record("running")))

    def _show(self, record: Record) -> None:
        whole = record.as_json()
        self._settings.live.update(whole)
        self._probes.show(self._place, whole, self._sender.send)

    def _shown(self, record: Record) -> Record:
        """Steps have peaks of their own only where the counter was reset between them."""
        return record if self._settings.sees_steps else replace(record, steps=())

    def _end_tracking(self) -> None:
        if self._is_tracked:
            self.point(None)  # what a fault has cut off
        self._tracker = None


def _largest(live: Iterable[Allocation]) -> tuple[LiveTensor, ...]:
    first = sorted(live, key=lambda a: a.nbytes, reverse=True)[:_LARGEST]
    return tuple(
        LiveTensor(a.nbytes, a.shape, str(a.dtype).removeprefix("torch."), a.where) for a in first
    )
