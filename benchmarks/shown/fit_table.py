"""The tables of `fit_table`, and the one of the READMEs by card."""

from __future__ import annotations

from collections.abc import Sequence

from pack.nodes.denoiser.cost import CARDS
from pack.nodes.units import GIB, size

from ..card.tables import grid
from ..rows import Row
from .lines import picture

LARGEST_PX = 16384  # what the node takes
LARGEST_BATCH = 256  # how far is searched
HEADS = ("largest square", "largest batch of 1024x1024")


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Streamed weights and what fits at most; modelled times of a step."""
    return {"fit_table": _streamed(rows), "fit_times": _times(rows)}


def budgets(rows: Sequence[Row]) -> dict[float, tuple[list[Row], Row]]:
    """By budget in GiB: the rows of its pictures, and the one of what fits at most."""
    found = {}
    for gib in dict.fromkeys(row["budget_gib"] for row in rows if "budget_gib" in row):
        *pictures, most = (row for row in rows if row.get("budget_gib") == gib)
        found[gib] = pictures, most
    return found


def square(most: Row) -> str:
    side = most["largest_square_px"]
    return f"{side} px" if side < LARGEST_PX else f"{side} px or more"


def _streamed(rows: Sequence[Row]) -> str:
    """A line per budget, and one with the smallest budgets."""
    least = {picture(row): size(row["least_bytes"]) for row in rows if "least_bytes" in row}
    body = []
    for gib, (pictures, most) in budgets(rows).items():
        batch = most["largest_batch"]
        body.append([
            f"{gib} GiB", *map(_streams, pictures), square(most),
            f"{batch}" if batch < LARGEST_BATCH else f"{batch} or more",
        ])  # fmt: skip
    body.append(["smallest budget that fits", *least.values(), "", ""])
    return grid(("budget", *least, *HEADS), body)


def _streams(row: Row) -> str:
    if row["verdict"] != "fits":
        return row["verdict"]
    return f"{row['streamed_bytes'] / GIB:.2f} GiB" if row["streamed_bytes"] else "0"


def _times(rows: Sequence[Row]) -> str:
    """A line per budget, a column per card."""
    names = [card.name for card in CARDS]
    body = []
    for gib, (_, most) in budgets(rows).items():
        cells = (most["step_seconds"][name] for name in names)
        body.append([f"{gib} GiB", *(f"{fast:.2f} s, {slow:.2f} s" for fast, slow in cells)])
    return grid(("budget", *names), body)
