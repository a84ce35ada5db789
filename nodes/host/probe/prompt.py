"""Follows the running prompt: what ran since the last probe, and how high the memory rose.

The host makes a new registry of progress for each prompt. It calls the registry's handlers when a
node starts, moves on and ends. Our handler is added by the first probe of a prompt, so everything
that is kept about a prompt goes with its registry. The only global of ours is which page follows
which prompt, in events.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from comfy_execution.progress import ProgressHandler, get_progress_state

from ...probe.counter import Interval, PeakCounter
from ...probe.record import Figure, Record
from ...probe.recorder import Recorder, parts_of
from ...probe.report import completed, missed
from ...words import Words
from ..base.device import allocator_weights_bytes, may_stream
from .device import describe, figures, gauge_of, versions
from .events import Place
from .settings import NODE_ID, ProbeSettings

_NAME = "z_image_low_vram.probe"
_FIRST = Words(
    "firstProbe",
    "the first probe of this run on this device: its peak is the highest since the counter was "
    "last reset, which may have been in an earlier prompt",
)
AT_LEAST = Words(
    "whyAtLeast",
    "at least: a higher peak may have passed between two readings; the counter already showed a "
    "higher one and was not reset, or dynamic VRAM evicted or loaded weights",
)


@dataclass
class _SinceProbe:
    """What one device has done since the last probe."""

    whole: Interval  # since the last probe
    part: Interval  # since the last event of the host
    recorder: Recorder
    before: int  # bytes other than weights that were there when it began
    is_first: bool


class PromptProbes(ProgressHandler):
    """The probes of one prompt, and what is measured between them."""

    def __init__(self, registry: Any) -> None:
        super().__init__(_NAME)
        self.registry = registry
        self.records: dict[str, Record] = {}  # by node id, in the order in which they were measured
        self.live: dict[str, dict[str, Any]] = {}  # by the id that the page knows: the newest
        self._counters: dict[torch.device, PeakCounter] = {}
        self._open: dict[torch.device, _SinceProbe] = {}
        self._running: str | None = None
        self._ran: set[str] = set()  # the ids of the probes that did not come from the cache

    def start_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self._mark()
        self._running = node_id

    def update_handler(self, node_id: str, value: float, max_value: float, state: Any,
                       prompt_id: str, image: Any = None) -> None:  # fmt: skip
        self._mark()

    def finish_handler(self, node_id: str, state: Any, prompt_id: str) -> None:
        self._mark(is_end=True)
        self._running = None

    def reset(self) -> None:
        """The next prompt begins: nothing is followed any more."""
        self._open.clear()
        self._counters.clear()

    def counter(self, device: torch.device) -> PeakCounter:
        """The shared peak counter of a device."""
        if device not in self._counters:
            gauge = gauge_of(device)
            self._counters[device] = PeakCounter(gauge.read, gauge.reset)
        return self._counters[device]

    def end_interval(
        self, device: torch.device, settings: ProbeSettings
    ) -> tuple[Record, Recorder]:
        """Ends what ran since the last probe; returns the record, and the recorder that made it."""
        since = self._open.get(device) or self._begin(device, settings, is_first=True)
        self._mark()
        high = since.whole.take(reset=False)
        recorder = since.recorder
        recorder.blank = self.blank_record(device, settings)
        if high.bytes > recorder.peak_bytes:
            weights = high.beside_bytes + allocator_weights_bytes(device)
            recorder.point(parts_of(high.bytes, weights, since.before))
        if self._came_from_cache(settings.node_id):
            return recorder.blank, recorder
        if since.is_first:
            recorder.note(_FIRST)
        if not high.is_exact:
            recorder.is_at_least = True
            recorder.note(AT_LEAST)
        return recorder.record("done"), recorder

    def begin_interval(self, device: torch.device, settings: ProbeSettings) -> None:
        """Begins what runs until the next probe; resets the peak where the mode says so.

        Called when a probe, or a watched sampling, has ended.
        """
        if settings.node_id is not None:
            self._ran.add(settings.node_id)
        self._begin(device, settings, is_first=False)

    def blank_record(self, device: torch.device, settings: ProbeSettings) -> Record:
        """A record of these settings on this device, without measurements."""
        return Record(
            label=settings.label,
            state="cached",
            mode=settings.mode,
            detail=settings.detail,
            device=describe(device),
            measured_with=gauge_of(device).measured_with,
            prompt_id=get_progress_state().prompt_id,
        )

    def completed(
        self,
        record: Record,
        device: torch.device,
        settings: ProbeSettings,
        streamed: Iterable[Figure] | None = None,
    ) -> Record:
        """The record with this moment's figures, the prompt's summary, and its reports."""
        others = self._others(settings.node_id)
        return completed(record, figures(device, streamed), others, versions())

    def put(self, node_id: str | None, record: Record) -> None:
        """Keeps the latest record of a probe for the summaries of the later ones."""
        if node_id is not None:
            self.records.pop(node_id, None)
            self.records[node_id] = record

    def show(self, place: Place, record: dict[str, Any], send: Callable[..., None]) -> None:
        """Sends a record to the pages of the prompt, and keeps it for a page that asks."""
        if place.node_id is not None:
            self.live[place.node_id] = record
        send(place, record)

    def _begin(
        self, device: torch.device, settings: ProbeSettings, *, is_first: bool
    ) -> _SinceProbe:
        old = self._open.pop(device, None)
        if old is not None:
            old.whole.close()
            old.part.close()
        counter = self.counter(device)
        whole = counter.open_since_reset() if is_first else counter.open(reset=settings.resets)
        part = counter.open(reset=False)
        recorder = Recorder(missed(""))
        total, weights = part.now.total, allocator_weights_bytes(device)
        before = max(0, part.now.current - weights)
        recorder.point(parts_of(total, part.now.beside_bytes + weights, before))
        since = self._open[device] = _SinceProbe(whole, part, recorder, before, is_first)
        return since

    def _mark(self, *, is_end: bool = False) -> None:
        """Notes the highest since the last event, and in which node it was.

        Args:
            is_end: a node has ended, and the host has given up its copy buffers.
        """
        for device, since in self._open.items():
            high = since.part.take(reset=False, is_blind=is_end and may_stream(device))
            weights = allocator_weights_bytes(device)
            # What was there before and is gone by now hides no activations.
            since.before = min(since.before, max(0, since.part.now.current - weights))
            parts = parts_of(high.bytes, high.beside_bytes + weights, since.before)
            since.recorder.point(parts, block=self._class_of(self._running))

    def _class_of(self, node_id: str | None) -> str:
        """The class of the node that runs, as a reader knows it."""
        if node_id is None or not self.registry.dynprompt.has_node(node_id):
            return Words("betweenNodes", "between nodes")
        return self.registry.dynprompt.get_node(node_id)["class_type"]

    def _came_from_cache(self, node_id: str | None) -> bool:
        """True where the node on the probe's input did not run in this prompt."""
        dynprompt = self.registry.dynprompt
        if node_id is None or not dynprompt.has_node(node_id):
            return False
        link = dynprompt.get_node(node_id)["inputs"].get("value")
        # The registry has the nodes that started; the host never visits those from its cache.
        return isinstance(link, list) and link[0] not in self.registry.nodes

    def _others(self, node_id: str | None) -> list[Record]:
        """The records of the prompt's other probes so far, those from the cache first."""
        cached = []
        for other, node in self.registry.dynprompt.get_original_prompt().items():
            is_other = node.get("class_type") == NODE_ID and other != node_id
            # The host has visited it, and it did not run.
            if is_other and other not in self._ran and other in self.registry.nodes:
                cached.append(missed(str(node["inputs"].get("label", ""))))
        return cached + [record for other, record in self.records.items() if other != node_id]


def current() -> PromptProbes:
    """The probes of the prompt that runs now; made for its first probe."""
    registry = get_progress_state()
    probes = registry.handlers.get(_NAME)
    if not isinstance(probes, PromptProbes):
        probes = PromptProbes(registry)
        registry.register_handler(probes)
    return probes


def live_records(prompt_id: str) -> dict[str, dict[str, Any]]:
    """The newest record of each probe of the running prompt, by the id that the page knows."""
    registry = get_progress_state()
    probes = registry.handlers.get(_NAME)
    if registry.prompt_id != prompt_id or not isinstance(probes, PromptProbes):
        return {}
    return dict(probes.live)
