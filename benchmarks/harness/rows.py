"""Raw rows of a benchmark, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def cell_of(row: Row, key: Sequence[str]) -> tuple[Any, ...]:
    """What tells a row from the others."""
    return tuple(row[name] for name in key)


def merged(path: Path, measured: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The rows of a file and the measured ones, which replace those of the same cell."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = {cell_of(row, key): row for row in [*map(json.loads, lines), *measured]}
    return list(rows.values())


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
