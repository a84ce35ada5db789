"""What a probe writes below the host's output folder; a folder that refuses ends no run."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_execution.progress import get_progress_state

from ...probe.history import append, row, workflow_hash
from ...probe.record import Figure, Record
from ...probe.recorder import Recorder
from ...probe.snapshot import snapshot
from ...probe.tracker import PeakTracker
from ...words import Words
from .device import figures, versions

logger = logging.getLogger(__name__)

FOLDER = "z_image_low_vram"
HISTORY = f"{FOLDER}/vram_history.jsonl"
_PIXELS_PER_LATENT = 8
# Allocations that torch keeps; the oldest are dropped first.
_ENTRIES = 500_000


def about_sampling(patcher: Any, noise: Any) -> dict[str, Any]:
    """Model, size, batch and dtype of a sampling, for the history."""
    model = patcher.model
    about: dict[str, Any] = {
        "model": type(model).__name__,
        "dtype": str(model.get_dtype_inference()).removeprefix("torch."),
    }
    shape = tuple(getattr(noise, "shape", ()))
    if len(shape) >= 4:
        ratio = getattr(model.latent_format, "spacial_downscale_ratio", _PIXELS_PER_LATENT)
        about["batch"] = shape[0]
        about["size"] = f"{shape[-1] * ratio}x{shape[-2] * ratio}"
    return about


def about_value(value: Any) -> dict[str, Any]:
    """Shape and dtype of a latent or an image; nothing for other values."""
    tensor = value.get("samples") if isinstance(value, dict) else value
    if not isinstance(tensor, torch.Tensor):
        return {}
    shape = list(tensor.shape)
    return {"value_shape": shape, "value_dtype": str(tensor.dtype).removeprefix("torch.")}


def keep(
    recorder: Recorder,
    record: Record,
    about: dict[str, Any],
    device: torch.device,
    streamed: Sequence[Figure] | None = None,
) -> None:
    """Appends a row to the history; what prevents it becomes a note."""
    prompt = get_progress_state().dynprompt.get_original_prompt()
    entry = row(
        record,
        time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        figures=tuple(figures(device, streamed)),
        about={"workflow": workflow_hash(prompt), **about, "versions": versions()},
    )
    with _writing(recorder, HISTORY, _no_history) as path:
        append(path, entry)


@contextmanager
def memory_history(
    device: torch.device, recorder: Recorder, tracker: PeakTracker
) -> Iterator[None]:
    """Writes what is allocated meanwhile as torch's memory viewer opens it.

    This is torch's own history where torch keeps one, else the tracker's log.
    """
    why_not = Words("onDevice", "on $1", device.type)
    if device.type == "cuda":
        why_not = _begin_history()
    try:
        yield
    finally:
        now = f"{time.strftime('%Y%m%d_%H%M%S')}_{time.time_ns() // 1000 % 10**6:06}"
        name = f"{FOLDER}/vram_{now}.pickle"
        try:
            with _writing(recorder, name, _no_viewer_file) as path:
                path.parent.mkdir(parents=True, exist_ok=True)
                if why_not is None:
                    torch.cuda.memory._dump_snapshot(str(path))
                else:
                    with path.open("wb") as file:
                        pickle.dump(snapshot(tracker.log), file)
                    recorder.note(
                        Words(
                            "watchedOnly",
                            "the file for torch's memory viewer has the operations that were "
                            "watched: torch keeps no such history $1",
                            why_not,
                        )
                    )
        finally:
            if why_not is None:
                torch.cuda.memory._record_memory_history(enabled=None)


def _no_history(why: object) -> Words:
    return Words("historyNotWritten", "the history was not written: $1", why)


def _no_viewer_file(why: object) -> Words:
    return Words("noViewerFile", "no file for torch's memory viewer: $1", why)


def _begin_history() -> Words | None:
    """Starts torch's record of CUDA's allocations; returns the reason where torch refuses."""
    try:
        # Underscored, yet the documented way to this file.
        torch.cuda.memory._record_memory_history(max_entries=_ENTRIES, stacks="python")
    except RuntimeError:
        backend = torch.cuda.get_allocator_backend()
        return Words("withAllocator", "with the allocator $1", backend)
    return None


@contextmanager
def _writing(recorder: Recorder, name: str, complaint: Callable[[object], Words]) -> Iterator[Path]:
    """The path of a file below the output folder; what prevents the writing becomes a note."""
    try:
        yield Path(folder_paths.get_output_directory()) / name
    except (OSError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        logger.warning("VRAM Probe: %s", complaint(why))
        recorder.note(complaint(why))
    else:
        recorder.files.append(name)
