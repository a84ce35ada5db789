"""What a probe collects: timeline, shared counter, recorder, report, history, chart."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from pack.nodes.probe import history, report
from pack.nodes.probe.counter import Count, PeakCounter, Region
from pack.nodes.probe.record import Device, Figure, LiveTensor, Parts, Record, Sample
from pack.nodes.probe.recorder import Pace, Recorder, parts_of
from pack.nodes.probe.timeline import Timeline

GIB = 2**30
CARD = Device("cuda:0 A card", "cuda", 16 * GIB, "cudaMallocAsync")
BLANK = Record("decode", "cached", "measure", "blocks", CARD, "torch's cuda allocator")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Allocator:
    """Counts as torch's does: the current bytes, and the highest since it was reset."""

    def __init__(self) -> None:
        self.current = self.peak = 0
        self.beside: tuple[Region, ...] = ()

    def use(self, count: int) -> None:
        self.current = count
        self.peak = max(self.peak, count)

    def read(self) -> Count:
        return Count(self.current, self.peak, self.beside)

    def reset(self) -> None:
        self.peak = self.current


def sampled() -> Recorder:
    """Two steps of two blocks; the peak is in the second block of the first."""
    clock = Clock()
    recorder = Recorder(BLANK, clock)
    recorder.point(Parts(4 * GIB, 0, 100), block="loading")
    for step in (1, 2):
        recorder.begin_step()
        for block in (0, 1):
            clock.now += 0.25
            live = {(1, 1): 700, (2, 1): 700}.get((step, block), 300)
            recorder.point(Parts(4 * GIB, live, 100), block=f"layers.{block}", operation="aten.mm")
        recorder.end_step()
    return recorder


@pytest.mark.parametrize("count", [1, 2, 399, 400, 401, 5000])
def test_a_timeline_is_short_and_keeps_first_last_and_peak(count):
    numbers = random.Random(count)
    timeline = Timeline()
    added = []
    for index in range(count):
        parts = Parts(numbers.randrange(10**6), numbers.randrange(10**6), 0)
        added.append(Sample(float(index), parts))
        timeline.add(added[-1])
        if index % 37 == 0:
            assert len(timeline.samples()) <= 400
    kept = timeline.samples()
    assert len(kept) <= 400
    assert max(s.parts.total for s in kept) == max(s.parts.total for s in added)
    assert kept[0] is added[0]
    assert kept[-1] is added[-1]
    assert [s.t_s for s in kept] == sorted({s.t_s for s in kept})
    assert len(kept) > min(count, 100) - 1


class TestCounter:
    def test_one_readers_setting_back_takes_nothing_from_another(self):
        """Two probes on one model: both see the peak between their own readings."""
        allocator = Allocator()
        counter = PeakCounter(allocator.read, allocator.reset)
        slow, fast = counter.open(reset=True), counter.open(reset=True)
        allocator.use(500)
        allocator.use(100)
        assert fast.take(reset=True)[:2] == (500, True)
        allocator.use(300)
        allocator.use(50)
        assert fast.take(reset=True)[:2] == (300, True)
        assert slow.take(reset=True)[:2] == (500, True)

    def test_a_peak_from_before_is_not_the_intervals(self):
        allocator = Allocator()
        counter = PeakCounter(allocator.read, allocator.reset)
        allocator.use(900)
        allocator.use(100)
        interval = counter.open(reset=False)
        allocator.use(400)
        allocator.use(200)
        assert interval.take(reset=False)[:2] == (200, False), "nobody has seen the 400"
        allocator.use(1000)
        allocator.use(10)
        assert interval.take(reset=False)[:2] == (1000, True)
        assert interval.take(reset=False)[:2] == (10, False)
        assert allocator.peak == 1000, "nothing was reset"

    def test_what_rises_above_the_peak_from_before_is_exact_whatever_was_read_earlier(self):
        """Bug: one low reading in the interval, and its peak was called the least for good."""
        allocator = Allocator()
        counter = PeakCounter(allocator.read, allocator.reset)
        allocator.use(900)
        allocator.use(100)
        whole = counter.open(reset=False)
        counter.settle(reset=False)
        allocator.use(1000)
        allocator.use(10)
        assert whole.take(reset=False)[:2] == (1000, True)
        allocator.use(20)
        counter.settle(reset=True)
        allocator.use(999)
        assert whole.take(reset=False)[:2] == (999, False), "nobody knows what was before the 20"

    def test_a_counter_that_cannot_be_reset_is_asked_all_the_same(self):
        allocator = Allocator()
        allocator.use(900)
        allocator.use(100)
        counter = PeakCounter(allocator.read, None)
        interval = counter.open(reset=True)
        assert interval.take(reset=True)[:2] == (100, False)
        assert counter.open_since_reset().take(reset=False)[:2] == (900, True)

    @pytest.mark.parametrize(
        ("then", "high"),
        [
            ((Region(1, 50),), (150, True, 50)),  # as before
            ((Region(1, 70),), (150, False, 50)),  # it may have grown before the peak
            ((Region(1, 50, 1),), (100, False, 0)),  # it may have been gone at the peak
            ((Region(1, 30),), (100, False, 0)),
            ((Region(1, 50), Region(2, 40)), (150, False, 50)),
            ((Region(2, 50),), (100, False, 0)),
            ((), (100, False, 0)),
        ],
    )
    def test_a_region_counts_as_far_as_it_must_have_been_there(self, then, high):
        allocator = Allocator()
        allocator.beside = (Region(1, 50),)
        counter = PeakCounter(allocator.read, allocator.reset)
        interval = counter.open(reset=True)
        allocator.use(100)
        allocator.use(0)
        allocator.beside = then
        assert interval.take(reset=False) == high

    def test_nobody_knows_what_a_region_was_before_the_first_reading(self):
        allocator = Allocator()
        allocator.use(100)
        allocator.use(20)
        allocator.beside = (Region(1, 50),)
        counter = PeakCounter(allocator.read, allocator.reset)
        assert counter.open_since_reset().take(reset=False) == (100, False, 0)

    def test_a_closed_interval_is_told_nothing(self):
        allocator = Allocator()
        counter = PeakCounter(allocator.read, allocator.reset)
        interval = counter.open(reset=True)
        interval.close()
        interval.close()
        allocator.use(500)
        counter.settle(reset=True)
        assert interval.now.total == 0


class TestRecorder:
    def test_peak_steps_and_parts(self):
        record = sampled().record("done")
        assert record.peak_bytes == 4 * GIB + 800
        assert record.parts_at_peak == Parts(4 * GIB, 700, 100)
        at = record.peak_at
        assert at is not None
        assert (at.t_s, at.step, at.block, at.operation) == (0.5, 1, "layers.1", "aten.mm")
        assert [(s.step, s.start_s, s.seconds) for s in record.steps] == [
            (1, 0, 0.5),
            (2, 0.5, 0.5),
        ]
        assert {s.peak_bytes for s in record.steps} == {record.peak_bytes}

    def test_a_dropped_step_is_none(self):
        recorder = sampled()
        recorder.begin_step()
        recorder.drop_step()
        recorder.end_step()
        assert len(recorder.record("done").steps) == 2

    @pytest.mark.parametrize(
        ("total", "weights", "before", "parts"),
        [
            (100, 60, 30, Parts(60, 10, 30)),
            (100, 60, 80, Parts(60, 0, 40)),
            (100, 160, 30, Parts(100, 0, 0)),  # a mapped file, not resident yet
            (0, 0, 0, Parts(0, 0, 0)),
        ],
    )
    def test_the_parts_add_up(self, total, weights, before, parts):
        assert parts_of(total, weights, before) == parts
        assert parts.total == total

    def test_pace(self):
        clock = Clock()
        pace = Pace(8, clock)
        sent = 0
        for _ in range(1000):
            sent += pace.is_due()
            clock.now += 0.01
        assert 70 <= sent <= 80


class TestRecord:
    def test_json_has_every_key_of_the_contract_from_the_first_moment(self):
        """The page reads them; and the host's history holds one dict that must not grow."""
        blank, whole = BLANK.as_json(), sampled().record("done").as_json()
        keys = "version label state mode detail device measured_with peak_bytes peak_at "
        keys += "parts_at_peak timeline steps figures largest report issue_report"
        assert set(keys.split()) <= set(whole)
        assert list(blank) == list(whole)
        assert json.loads(json.dumps(whole)) == whole
        assert whole["timeline"][2] == [0.5, 4 * GIB, 700, 100, 1, "layers.1"]
        assert blank["peak_bytes"] is None
        assert blank["peak_at"] is None

    def test_a_figure_is_bytes_or_a_reason(self):
        for count, reason in ((None, None), (0, "none")):
            with pytest.raises(ValueError, match="must have bytes or a reason"):
                Figure("torch reserved", count, reason)


class TestReport:
    def complete(self) -> Record:
        recorder = sampled()
        recorder.largest = (LiveTensor(2**20, (4, 65536), "float32", "model.py:12 forward"),)
        recorder.note("a note")
        figures = [Figure("torch reserved", 5 * GIB), Figure("pinned", None, "no pinning here")]
        other = replace(BLANK, label="text encode", state="done", peak_bytes=GIB)
        versions = {"torch": "2.11.0", "ComfyUI": "0.30.0"}
        record = recorder.record("interrupted")
        return report.completed(record, figures, [report.missed("load"), other], versions)

    def test_the_table_says_it_all(self):
        text = self.complete().report
        for part in (
            "decode: peak 4.00 GiB",
            "interrupted: the record ends there",
            "peak at step 1, layers.1, operation aten.mm, 0.50 s",
            "cuda:0 A card with 16.00 GiB, allocator cudaMallocAsync",
            "   2     0.500    4.00 GiB",
            "1.0 MiB  4x65536 float32  model.py:12 forward",
            "torch reserved: 5.00 GiB",
            "pinned: not available: no pinning here",
            "1. load: cached, not measured",
            "2. text encode: peak 1.00 GiB",
            "note: a note",
        ):
            assert part in text

    def test_the_issue_block_names_versions_and_no_label(self):
        block = self.complete().issue_report
        assert "decode" not in block
        for part in ("| torch | 2.11.0 |", "| state | interrupted |", "detail blocks"):
            assert part in block
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert all(row.count("|") == 3 for row in rows)


class TestHistory:
    def test_rows_are_appended(self, tmp_path: Path):
        path = tmp_path / "new" / "rows.jsonl"
        entry = history.row(
            sampled().record("done"),
            time="2026-01-01T00:00:00+0000",
            figures=[Figure("torch reserved", 7), Figure("pinned", None, "no")],
            about={"model": "Lumina2", "size": "1024x1024"},
        )
        history.append(path, entry)
        history.append(path, entry)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert rows == [entry, entry]
        assert entry["peak_bytes"] == 4 * GIB + 800
        assert entry["seconds_per_step"] == 0.5
        assert (entry["model"], entry["device"]) == ("Lumina2", CARD.name)
        assert entry["figures"] == {"torch reserved": 7}

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
    def test_a_full_disk_is_an_error(self):
        with pytest.raises(OSError, match="No space left"):
            history.append(Path("/dev/full"), {"a": 1})

    def test_the_hash_sees_settings_and_not_the_order(self):
        one = history.workflow_hash({"1": {"a": 1}, "2": {"b": 2}})
        assert history.workflow_hash({"2": {"b": 2}, "1": {"a": 1}}) == one
        assert history.workflow_hash({"1": {"a": 2}, "2": {"b": 2}}) != one


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "Peak 15.00 GiB of 16.00 GiB: 1.00 GiB left for the driver and other programs."),
        (
            {"state": "running", "is_at_least": True},
            "Peak so far at least 15.00 GiB of 16.00 GiB: at most 1.00 GiB left for the driver and "
            "other programs.",
        ),
        (
            {"state": "failed"},
            "Peak until then 15.00 GiB of 16.00 GiB: 1.00 GiB left for the driver and other "
            "programs.",
        ),
        (
            {"device": replace(CARD, total_bytes=12 * GIB)},
            "Peak 15.00 GiB: that is 3.00 GiB more than the card's 12.00 GiB.",
        ),
        (
            {"device": replace(CARD, total_bytes=None)},
            "Peak 15.00 GiB. The size of the card is not known.",
        ),
        (
            {"device": replace(CARD, type="cpu")},
            "Peak 15.00 GiB of tensors, in RAM: no GPU was used.",
        ),
        (
            {"device": replace(CARD, type="cpu"), "measured_with": "RAM of the process (RSS)"},
            "Peak 15.00 GiB of RAM, for all of ComfyUI: no GPU was used.",
        ),
        (
            {"device": replace(CARD, type="mps"), "measured_with": "RAM of the process (RSS)"},
            "Peak 15.00 GiB of RAM, for all of ComfyUI: this GPU shares it.",
        ),
    ],
)
def test_the_report_says_what_the_peak_means_as_the_page_does(changed, sentence):
    record = replace(BLANK, **{"state": "done", "peak_bytes": 15 * GIB, **changed})
    assert report.meaning(record) == sentence
    assert report.report(record).splitlines()[1] == sentence


def test_the_report_has_no_meaning_of_a_peak_that_was_not_measured():
    assert report.meaning(BLANK) == ""
