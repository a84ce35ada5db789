"""What a device, the process and the host can say about memory, each figure under its own name."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import comfy.memory_management as memory
import comfy.model_management as management
import comfyui_version
import psutil
import torch

from ..base.device import (
    allocator_bytes,
    is_card,
    is_dynamic,
    models_on,
    pages_bytes,
    resident_page_bytes,
)

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_AND_PAGES = ", and the pages of dynamic VRAM as they are at each reading"
_RSS = re.compile(rb"VmHWM:\s+(\d+) kB\s+VmRSS:\s+(\d+) kB")
# bytes, and why there are none
Amount = tuple[int | None, str | None]


class Gauge(NamedTuple):
    """A counter of bytes in use.

    read: current and highest bytes since the counter was set back.
    set_back: sets the highest to the current; None where that cannot be done.
    measured_with: its name for a reader.
    """

    read: Callable[[], tuple[int, int]]
    set_back: Callable[[], None] | None
    measured_with: str


def device_of(value: Any) -> torch.device:
    """The device on which the value's model computes; for other values, the host's main device."""
    patcher = getattr(value, "patcher", value)
    device = getattr(patcher, "load_device", None) or getattr(value, "device", None)
    if isinstance(value, torch.Tensor) or not isinstance(device, torch.device):
        return management.get_torch_device()
    return device


def gauge_of(device: torch.device) -> Gauge:
    """The best counter of that device: the allocator's own, or the process' memory."""
    counts = getattr(torch, device.type, None)
    if is_card(device) and hasattr(counts, "memory_stats"):

        def read() -> tuple[int, int]:
            # One call for both numbers; pages of dynamic VRAM are not the allocator's.
            current, peak = allocator_bytes(device)
            pages = pages_bytes(device)
            return current + pages, peak + pages

        return Gauge(
            read,
            lambda: counts.reset_peak_memory_stats(device),
            f"torch's {device.type} allocator" + (_AND_PAGES if memory.aimdo_enabled else ""),
        )
    return _process_gauge()


def describe(device: torch.device) -> dict[str, Any]:
    """Name, type, total bytes and allocator of the device."""
    total: int | None = None
    with suppress(RuntimeError, AttributeError, KeyError):
        total = int(management.get_total_memory(device))
    if is_card(device):
        name = f"{device} {getattr(torch, device.type).get_device_name(device)}"
    else:
        name = f"{device.type} ({platform.machine() or 'unknown machine'})"
    return {
        "name": name,
        "type": device.type,
        "total_bytes": total,
        "allocator": _allocator() if device.type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """Names and versions of what runs, without paths."""
    found = {
        "ComfyUI": comfyui_version.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.system(),
    }
    if torch.version.cuda:
        found["CUDA of torch"] = torch.version.cuda
    if torch.version.hip:
        found["HIP of torch"] = torch.version.hip
    return found


def figures(
    device: torch.device, streamed: Iterable[tuple[str, int | None, str | None]] | None = None
) -> Iterator[tuple[str, int | None, str | None]]:
    """Name, bytes, and the reason where there are no bytes, of everything that can be asked.

    Args:
        device: of which it is asked.
        streamed: figures of that kind of a watched sampling.
    """
    yield from _allocator_figures(device)
    yield from _driver_figures(device)
    for patcher in models_on(device):
        yield from _model_figures(patcher)
    if not any(is_dynamic(patcher) for patcher in models_on(device)):
        yield "pages of dynamic VRAM", None, "no model here is loaded with dynamic VRAM"
    if streamed is None:
        yield "weights streamed per step", None, _streams_unseen(device)
    else:
        yield from streamed
    yield "pinned RAM of the host", *_pinned()
    ram = psutil.virtual_memory()
    yield "RAM of this process", psutil.Process().memory_info().rss, None
    _, peak = _process_gauge().read()
    yield "RAM of this process, highest since it was set back", peak, None
    yield "RAM in use on this machine", ram.total - ram.available, None


def _streams_unseen(device: torch.device) -> str:
    if device.type == "cpu":
        return "weights and arithmetic are both in RAM"
    return "seen while a model is sampled behind a probe on its MODEL wire"


def _allocator() -> str:
    backend = torch.cuda.get_allocator_backend()
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    is_expandable = re.search(r"expandable_segments:\s*true", settings, re.IGNORECASE)
    return f"{backend}, expandable segments" if is_expandable else backend


def _allocator_figures(device: torch.device) -> Iterator[tuple[str, int | None, str | None]]:
    names = ("torch allocated", "torch reserved")
    if device.type not in ("cuda", "xpu"):
        reason = f"torch keeps no such count on {device.type}"
        if device.type == "mps":
            yield "torch allocated", torch.mps.current_allocated_memory(), None
            yield "torch reserved", torch.mps.driver_allocated_memory(), None
            return
        for name in names:
            yield name, None, reason
        return
    for name, kind in zip(names, ("allocated_bytes", "reserved_bytes"), strict=True):
        current, peak = allocator_bytes(device, kind)
        yield name, current, None
        yield f"{name}, highest since it was set back", peak, None


def _driver_figures(device: torch.device) -> Iterator[tuple[str, int | None, str | None]]:
    names = ("driver used on the device", "other processes and driver contexts")
    info = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    if info is None:
        reason = f"a {device.type} device has no memory of its own to ask for"
        yield from ((name, None, reason) for name in names)
        return
    try:
        free, total = info(device)
    except (RuntimeError, AssertionError) as error:
        reason = f"the driver does not answer ({type(error).__name__})"
        yield from ((name, None, reason) for name in names)
        return
    used = total - free
    reserved, _ = allocator_bytes(device, "reserved_bytes")
    yield names[0], used, None
    yield names[1], max(0, used - reserved - pages_bytes(device)), None


def _model_figures(patcher: Any) -> Iterator[tuple[str, int | None, str | None]]:
    name = type(patcher.model).__name__
    loaded, whole = patcher.loaded_size(), patcher.model_size()
    yield f"{name}: weights on the device", loaded, None
    yield f"{name}: weights elsewhere", max(0, whole - loaded), None
    if is_dynamic(patcher):
        yield f"{name}: pages resident", resident_page_bytes(patcher), None


def _pinned() -> Amount:
    total = getattr(management, "TOTAL_PINNED_MEMORY", None)
    if total is None:
        return None, "this host does not count it"
    if getattr(management, "MAX_PINNED_MEMORY", -1) <= 0:
        return None, "the host pins no memory on this machine"
    return int(total), None


def _process_gauge() -> Gauge:
    """The resident memory of this process, and the highest that the system remembers.

    What a process has freed may stay resident and be used again: then nothing rises.
    """
    if _STATUS.exists():
        return Gauge(_read_status, _peak_reset(), "RAM of the process (RSS)")
    process = psutil.Process()
    if sys.platform == "win32":

        def read() -> tuple[int, int]:
            info = process.memory_info()
            return info.rss, info.peak_wset

        return Gauge(read, None, "RAM of the process (working set)")

    def read_now() -> tuple[int, int]:
        rss = process.memory_info().rss
        return rss, rss

    return Gauge(read_now, None, "RAM of the process (RSS), at the readings only")


def _read_status() -> tuple[int, int]:
    found = _RSS.search(_STATUS.read_bytes())
    if found is None:  # some containers leave the lines out
        rss = psutil.Process().memory_info().rss
        return rss, rss
    peak, current = (int(number) * 1024 for number in found.groups())
    return current, max(current, peak)


def _peak_reset() -> Callable[[], None] | None:
    """What sets the kernel's peak of this process back; None where that is not allowed."""
    if not os.access(_CLEAR_REFS, os.W_OK):
        return None

    def set_back() -> None:
        with suppress(OSError):
            _CLEAR_REFS.write_bytes(b"5")  # 5: the peak alone, see the kernel's proc(5)

    return set_back
