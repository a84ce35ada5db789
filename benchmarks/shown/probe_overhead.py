"""The tables of `probe_overhead`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..card.tables import grid
from ..rows import Row

COUNTER_ONLY = "blocks, counter only"
LIMITS = {"totals": 0.005, "steps": 0.01, COUNTER_ONLY: 0.03, "blocks": 0.03}
HEADS = (
    "detail", "size", "a step", "readings", "events", "watching", "of the step", "our limit",
)  # fmt: skip


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """What is counted, and the check with a stopwatch."""
    watched = [
        (row["detail"], row["size"], spread(row["ratios"]), spread(row["noise"])) for row in rows
    ]
    heads = ("detail", "size", "with the probe / without", "without / without")
    return {
        "probe_overhead": grid(HEADS, map(_cells, rows)),
        "probe_stopwatch": grid(heads, watched),
    }


def _cells(row: Row) -> list[str]:
    each, count = row["operation_microseconds"], row["operations"]
    own = row["reading_microseconds"] + row["events_microseconds"] + count * each
    limit = LIMITS.get(row["detail"])
    return [
        row["detail"], row["size"], f"{row['step_seconds']:.2f} s",
        f"{row['reading_microseconds'] / 1e3:.2f} ms",
        f"{row['events_microseconds'] / 1e3:.2f} ms",
        f"{count * each / 1e3:.1f} ms ({count} x {each:.0f} us)" if count else "-",
        f"{own / 1e4 / row['step_seconds']:.2f} %",
        "-" if limit is None else f"{100 * limit:.1f} %",
    ]  # fmt: skip


def spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
