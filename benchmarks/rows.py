"""Raw rows of a benchmark, one JSON object a line, and what they depend on.

Rows go to benchmarks/results and pictures to docs/pictures, or both to the folder that
ZIMAGE_RESULTS_DIR names.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]
REPO = Path(__file__).resolve().parent.parent
_CHOSEN_DIR = os.environ.get("ZIMAGE_RESULTS_DIR")
RESULTS_DIR = Path(_CHOSEN_DIR or REPO / "benchmarks" / "results")
PICTURES_DIR = Path(_CHOSEN_DIR or REPO / "docs" / "pictures")


def cell_of(row: Row, key: Sequence[str]) -> tuple[Any, ...]:
    """What tells a row from the others."""
    return tuple(row[name] for name in key)


def merged(path: Path, measured: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The rows of a file and the measured ones, which replace those of the same cell."""
    rows = {cell_of(row, key): row for row in [*read(path), *measured]}
    return list(rows.values())


def read(path: Path) -> list[Row]:
    """The rows of a file; none where nothing was measured yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file's rows; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def versions() -> dict[str, str]:
    """What the figures depend on."""
    import comfyui_version
    import torch

    try:
        kitchen = version("comfy-kitchen")
    except PackageNotFoundError:
        kitchen = "none"
    return {
        "host": comfyui_version.__version__,
        "torch": torch.__version__,
        "comfy_kitchen": kitchen,
        "python": platform.python_version(),
    }
