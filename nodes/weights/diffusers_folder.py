"""A diffusers-layout folder: which components it holds, and the schedule's shift."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from .component import INDEX_SUFFIX, Component, open_folder, read_json
from .header import WeightsError

TRANSFORMER = "transformer"
TEXT_ENCODER = "text_encoder"
VAE = "vae"
PARTS = frozenset((TRANSFORMER, TEXT_ENCODER, VAE))
MAX_DEPTH = 4


def find_folders(roots: Iterable[Path]) -> dict[str, Path]:
    """Finds the diffusers-layout folders: those with a transformer/, text_encoder/ or vae/ in them.

    Args:
        roots: search paths; the first that has a name wins.

    Returns:
        The folders by their name below the search path, with forward slashes and one at the end.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, subfolders, _ in os.walk(root, followlinks=True):
            inside = Path(folder).relative_to(root)
            depth = len(inside.parts)
            is_model = depth > 0 and not PARTS.isdisjoint(subfolders)
            if is_model:
                found.setdefault(f"{inside.as_posix()}/", Path(folder))
            if is_model or depth == MAX_DEPTH:
                subfolders.clear()
            else:
                subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
    return found


def open_part(folder: Path, label: str, part: str) -> Component:
    """Opens one part of a diffusers-layout folder.

    Raises:
        WeightsError: the part is missing, incomplete or malformed.
    """
    if not (folder / part).is_dir():
        raise WeightsError(
            f"{label} holds no {part}/: download it, or choose a file for that component"
        )
    return open_folder(folder / part, f"{label}{part}/")


def scheduler_shift(folder: Path) -> float | None:
    """The timestep shift that scheduler/scheduler_config.json asks for; None where it names none.

    Raises:
        WeightsError: the file is not valid, or its shift is no number in (0, 100].
    """
    path = folder / "scheduler" / "scheduler_config.json"
    shift = read_json(path).get("shift") if path.is_file() else None
    if shift is None:
        return None
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift <= 100:
        raise WeightsError(f"scheduler/{path.name}: shift must be in (0, 100], got {shift!r}")
    return float(shift)


def pipeline_class(folder: Path) -> str:
    """The pipeline's class from model_index.json, such as "ZImagePipeline"; "" without it."""
    path = folder / "model_index.json"
    return str(read_json(path).get("_class_name", "")) if path.is_file() else ""


def files_of(folder: Path, part: str) -> list[Path]:
    """The files that decide what `open_part`, `scheduler_shift` and `pipeline_class` return."""
    patterns = ("config.json", "*.safetensors", f"*{INDEX_SUFFIX}")
    inside = [path for pattern in patterns for path in (folder / part).glob(pattern)]
    return [*inside, folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"]


def fingerprint(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Path, size in bytes and time of change in ns of each file that exists, sorted."""
    rows: list[tuple[str, int, int]] = []
    for path in sorted(set(paths)):
        with contextlib.suppress(OSError):
            stat = path.stat()
            rows.append((str(path), stat.st_size, stat.st_mtime_ns))
    return rows
