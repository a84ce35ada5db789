"""With what each table was measured, by the rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..card.tables import grid
from ..rows import Row

FACTS = {
    "device": "device", "dtype": "dtype", "host": "ComfyUI", "torch": "torch",
    "comfy_kitchen": "comfy-kitchen", "diffusers": "diffusers",
}  # fmt: skip


def section(by_script: Mapping[str, Sequence[Row]]) -> str:
    """A line per script; a cell names every value that its rows have."""
    body = []
    for name, rows in by_script.items():
        cells = []
        for fact in FACTS:
            values = sorted({str(row[fact]).partition("+")[0] for row in rows if row.get(fact)})
            cells.append("; ".join(values) or "-")
        body.append([f"`{name}`", f"{len(rows)}", *cells])
    return grid(("`python run.py bench`", "rows", *FACTS.values()), body)
