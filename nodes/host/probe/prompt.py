"""Follows the running prompt: what ran since the last probe, and how high the memory rose.

The host's registry of progress is made anew for each prompt, and calls its handlers when a node
starts, moves on and ends. Our handler stands in it from the first probe of a prompt on, so all that
is kept about a prompt goes with it: there is no thread and no global of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from comfy_execution.progress import ProgressHandler, get_progress_state

from ..base import device as loaded
from . import device as probe_device
from . import events as probe_events
from .settings import NODE_ID, ProbeSettings, Tools

_NAME = "z_image_low_vram.probe"
_FIRST = (
    "the first probe of this prompt on this device: its peak is the highest since the counter was "
    "last set back, be it by an earlier prompt"
)
AT_LEAST = (
    "the counter stood higher from before and was not set back: a peak below that is the highest "
    "of the readings, at least"
)


@dataclass
class _Stretch:
    """What is open on one device since the last probe."""

    whole: Any  # the Interval from the last probe on
    part: Any  # the Interval since the last event
    recorder: Any
    before: int
    is_first: bool


class PromptWatch(ProgressHandler):
    """The probes and stretches of one prompt."""

    def __init__(self, tools: Tools) -> None:
        super().__init__(_NAME)
        self.records: dict[str, Any] = {}  # by node id, in the order in which they were measured
        self.live: dict[str, dict[str, Any]] = {}  # by the id that the page knows: the newest
        self._tools = tools
        self._counters: dict[torch.device, tuple[Any, probe_device.Gauge]] = {}
        self._stretches: dict[torch.device, _Stretch] = {}
        self._running: str | None = None
        self._without_record: set[str] = set()

    def set_registry(self, registry: Any) -> None:
        self.registry = registry

    # What the host calls.

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self._mark()
        self._running = node_id

    def update_handler(self, node_id: str, value: float, max_value: float, state: Any,
                       prompt_id: str, image: Any = None) -> None:  # fmt: skip
        self._mark()

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self._mark()
        self._running = None

    def reset(self) -> None:
        """The next prompt begins: nothing is followed any more."""
        self._stretches.clear()
        self._counters.clear()

    # What probes call.

    def counter(self, device: torch.device) -> Any:
        """The shared peak counter of a device."""
        if device not in self._counters:
            gauge = probe_device.gauge_of(device)
            counter = self._tools.counter(lambda: self._tools.count(*gauge.read()), gauge.set_back)
            self._counters[device] = (counter, gauge)
        return self._counters[device][0]

    def measured_with(self, device: torch.device) -> str:
        self.counter(device)
        return self._counters[device][1].measured_with

    def end_stretch(self, device: torch.device, settings: ProbeSettings) -> tuple[Any, Any]:
        """Ends what ran since the last probe.

        Returns:
            The record, and the recorder that made it.
        """
        stretch = self._stretches.get(device)
        is_cached = self._came_from_cache(settings.node_id)
        if stretch is None:
            stretch = self._open(device, settings, is_first=True)
        self._mark()
        high = stretch.whole.take(set_back=False)
        recorder = stretch.recorder
        recorder.blank = blank_record(self, device, settings)
        weights = loaded.weights_bytes(device)
        if high.bytes > recorder.peak_bytes:
            recorder.point(self._tools.parts_of(high.bytes, weights, stretch.before))
        if not is_cached:
            if stretch.is_first:
                recorder.note(_FIRST)
            elif not high.is_exact:
                recorder.note(AT_LEAST)
        return (recorder.blank if is_cached else recorder.record("done")), recorder

    def begin_stretch(self, device: torch.device, settings: ProbeSettings) -> None:
        """Begins what runs until the next probe; sets the peak back where the mode says so.

        Called when a probe, or a watched sampling, has ended.
        """
        if settings.node_id is not None and settings.node_id not in self.records:
            self._without_record.add(settings.node_id)
        self._open(device, settings, is_first=False)

    def put(self, node_id: str | None, record: Any) -> None:
        """Keeps the latest record of a probe for the summaries of the later ones."""
        if node_id is not None:
            self.records.pop(node_id, None)
            self.records[node_id] = record

    def show(
        self,
        place: probe_events.Place,
        record: dict[str, Any],
        send: Callable[[probe_events.Place, dict[str, Any]], None] = probe_events.send,
    ) -> None:
        """Sends a record to the page of the prompt, and keeps it for those that ask."""
        if place.node_id is not None:
            self.live[place.node_id] = record
        send(place, record)

    def others(self, node_id: str | None) -> list[Any]:
        """The records of the prompt's other probes so far, those from the cache first."""
        measured = [record for other, record in self.records.items() if other != node_id]
        return [self._tools.missed(label) for label in self._cached_probes(node_id)] + measured

    def _open(self, device: torch.device, settings: ProbeSettings, *, is_first: bool) -> _Stretch:
        old = self._stretches.pop(device, None)
        if old is not None:
            old.whole.close()
            old.part.close()
        counter = self.counter(device)
        weights = loaded.weights_bytes(device)
        if is_first:
            count = counter.settle(set_back=False)
            whole, part = counter.open_since_set_back(), counter.open(set_back=False)
            current = count.current
        else:
            whole = counter.open(set_back=settings.sets_back)
            part = counter.open(set_back=False)
            current = whole.current
        recorder = self._tools.recorder(self._tools.missed(""))
        before = max(0, current - weights)
        recorder.point(self._tools.parts_of(current, weights, before))
        stretch = _Stretch(whole, part, recorder, before, is_first)
        self._stretches[device] = stretch
        return stretch

    def _mark(self) -> None:
        """Notes the highest since the last event, and in which node it was."""
        for device, stretch in self._stretches.items():
            high = stretch.part.take(set_back=False)
            weights = loaded.weights_bytes(device)
            # What was there before and is gone by now hides no activations.
            stretch.before = min(stretch.before, max(0, stretch.part.current - weights))
            parts = self._tools.parts_of(high.bytes, weights, stretch.before)
            stretch.recorder.point(parts, block=self._class_of(self._running))

    def _class_of(self, node_id: str | None) -> str:
        """The class of the node that runs, as a reader knows it."""
        if node_id is None or not self.registry.dynprompt.has_node(node_id):
            return "between nodes"
        return self.registry.dynprompt.get_node(node_id)["class_type"]

    def _came_from_cache(self, node_id: str | None) -> bool:
        """True where the node on the probe's input did not run in this prompt."""
        dynprompt = self.registry.dynprompt
        if node_id is None or not dynprompt.has_node(node_id):
            return False
        link = dynprompt.get_node(node_id)["inputs"].get("value")
        # The host enters a node when it starts; those it takes from its cache it never visits.
        return isinstance(link, list) and link[0] not in self.registry.nodes

    def _cached_probes(self, node_id: str | None) -> list[str]:
        """Labels of the probes that the host took from its cache."""
        labels = []
        for other, node in self.registry.dynprompt.get_original_prompt().items():
            is_probe = node.get("class_type") == NODE_ID and other != node_id
            has_run = other in self.records or other in self._without_record
            # The host has visited it, and it did not run.
            if is_probe and not has_run and other in self.registry.nodes:
                labels.append(str(node["inputs"].get("label", "")))
        return labels


def current(tools: Tools) -> PromptWatch:
    """The watch of the prompt that runs now; made when it is first asked for."""
    registry = get_progress_state()
    watch = registry.handlers.get(_NAME)
    if not isinstance(watch, PromptWatch):
        watch = PromptWatch(tools)
        watch.set_registry(registry)
        registry.register_handler(watch)
    return watch


def live_records(prompt_id: str) -> dict[str, dict[str, Any]]:
    """The newest record of each probe of the running prompt, by the id that the page knows."""
    registry = get_progress_state()
    watch = registry.handlers.get(_NAME)
    if registry.prompt_id != prompt_id or not isinstance(watch, PromptWatch):
        return {}
    return dict(watch.live)


def blank_record(watch: PromptWatch, device: torch.device, settings: ProbeSettings) -> Any:
    """A record of these settings on this device, without measurements."""
    tools = settings.tools
    return tools.record(
        label=settings.label,
        state="cached",
        mode=settings.mode,
        detail=settings.detail,
        device=tools.device(**probe_device.describe(device)),
        measured_with=watch.measured_with(device),
        prompt_id=get_progress_state().prompt_id,
    )


def completed(
    watch: PromptWatch,
    device: torch.device,
    settings: ProbeSettings,
    record: Any,
    streamed: Iterable[tuple[str, int | None, str | None]] | None = None,
) -> Any:
    """The record with this moment's figures, the prompt's summary, and its reports."""
    tools = settings.tools
    figures = tuple(tools.figure(*figure) for figure in probe_device.figures(device, streamed))
    others = watch.others(settings.node_id)
    return tools.completed(record, figures, others, probe_device.versions())
