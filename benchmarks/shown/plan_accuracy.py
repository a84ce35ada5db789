"""The tables of `plan_accuracy`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..card.tables import NOT_MEASURED, grid
from ..rows import Row

STAGES = (
    "text encode", "denoise", "denoise, stock", "ControlNet", "ControlNet, stock", "references",
    "references, stock", "VAE", "VAE, stock",
)  # fmt: skip
PLANNING = "planning"  # the row of the time that a plan takes


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """A line per stage, with the spread of predicted over measured; the time to plan."""
    body, count = [], 0
    for stage in STAGES:
        ratios = [
            row["predicted_bytes"] / row["measured_bytes"] for row in rows if row["stage"] == stage
        ]
        cells = [NOT_MEASURED] * 3
        if ratios:
            shown = (min(ratios), statistics.median(ratios), max(ratios))
            cells = [f"{value:.3f}" for value in shown]
        body.append([stage, f"{len(ratios)}", *cells])
        count += len(ratios)
    times = [row["plan_seconds"] for row in rows if row["stage"] == PLANNING]
    return {
        "plan_accuracy": grid(
            ("stage", "cases", "predicted / counted, lowest", "median", "highest"),
            [*body, ("all", f"{count}", "", "", "")],
        ),
        "plan_time": grid(
            ("what", "longest of 20"),
            [
                ("a plan that does not fit, with what else would", f"{1e3 * s:.0f} ms")
                for s in times
            ],
        ),
    }
