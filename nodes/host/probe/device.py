"""What a device, the process and the host report about memory, each figure under its own name."""

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

from ...probe.counter import Count
from ...probe.record import Device, Figure
from ...words import Words
from ..base.device import (
    allocator_bytes,
    copy_buffer_bytes,
    driver_bytes,
    is_card,
    is_dynamic,
    models_on,
    resident_page_bytes,
)
from .regions import Regions

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_PROCESS = Words("rss", "RAM of the process (RSS)")
_ALLOCATED, _RESERVED = Words("allocated", "torch allocated"), Words("reserved", "torch reserved")
_HWM_AND_RSS = re.compile(rb"VmHWM:\s+(\d+) kB\s+VmRSS:\s+(\d+) kB")


class Gauge(NamedTuple):
    """A counter of bytes in use.

    read: current and highest bytes since the counter was reset.
    reset: sets the highest to the current; None where that cannot be done.
    measured_with: its name for a reader.
    """

    read: Callable[[], Count]
    reset: Callable[[], None] | None
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
    counts: Any = getattr(torch, device.type, None)
    if is_card(device) and hasattr(counts, "memory_stats"):
        regions = Regions(device)

        def read() -> Count:
            return Count(*allocator_bytes(device), regions.read())

        told = Words("allocator", "torch's $1 allocator", device.type)
        if memory.aimdo_enabled:
            told = Words(
                "allocatorAndPages",
                "$1, and the pages and copy buffers of dynamic VRAM, read at the same moments",
                told,
            )
        return Gauge(read, lambda: counts.reset_peak_memory_stats(device), told)
    return _process_gauge()


def describe(device: torch.device) -> Device:
    """Name, type, total bytes and allocator of the device."""
    total: int | None = None
    with suppress(RuntimeError, AttributeError, KeyError):
        total = int(management.get_total_memory(device))
    if is_card(device):
        name = f"{device} {getattr(torch, device.type).get_device_name(device)}"
    else:
        machine = platform.machine() or Words("unknownMachine", "unknown machine")
        name = Words("machine", "$1 ($2)", device.type, machine)
    return Device(name, device.type, total, _allocator() if device.type == "cuda" else None)


def versions() -> dict[str, str]:
    """Names and versions of what runs, without paths."""
    found = {
        "ComfyUI": comfyui_version.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": platform.system(),
        "CUDA of torch": torch.version.cuda,
        "HIP of torch": torch.version.hip,
    }
    return {name: version for name, version in found.items() if version}


def figures(device: torch.device, streamed: Iterable[Figure] | None = None) -> Iterator[Figure]:
    """Everything that this machine can be asked for, with the reason where there is no answer.

    streamed: what a watched sampling saw; None outside of one.
    """
    yield from _allocator_figures(device)
    yield from _driver_figures(device)
    yield from _aimdo_figures(device)
    for patcher in models_on(device):
        yield from _model_figures(patcher)
    if not any(is_dynamic(patcher) for patcher in models_on(device)):
        reason = Words("noPages", "no model here is loaded with dynamic VRAM")
        yield Figure(Words("pages", "pages of dynamic VRAM"), None, reason)
    if streamed is None:
        reason = Words(
            "onlySampled", "measured only while a model is sampled after a probe on its MODEL wire"
        )
        if device.type == "cpu":
            reason = Words("bothInRam", "weights and arithmetic are both in RAM")
        yield Figure(Words("streamedPerStep", "weights streamed per step"), None, reason)
    else:
        yield from streamed
    yield _pinned()
    ram = psutil.virtual_memory()
    process = Words("processRam", "RAM of this process")
    yield Figure(process, _rss().current)
    yield Figure(_since_reset(process), _process_gauge().read().peak)
    yield Figure(Words("machineRam", "RAM in use on this machine"), ram.total - ram.available)


def _since_reset(name: str) -> Words:
    return Words("sinceReset", "$1, highest since the last reset", name)


def _allocator() -> str:
    backend = torch.cuda.get_allocator_backend()
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    is_expandable = re.search(r"expandable_segments:\s*true", settings, re.IGNORECASE)
    return f"{backend}, expandable segments" if is_expandable else backend


def _allocator_figures(device: torch.device) -> Iterator[Figure]:
    if device.type == "mps":
        yield Figure(_ALLOCATED, torch.mps.current_allocated_memory())
        yield Figure(_RESERVED, torch.mps.driver_allocated_memory())
        return
    for name, kind in ((_ALLOCATED, "allocated_bytes"), (_RESERVED, "reserved_bytes")):
        if is_card(device):
            current, peak = allocator_bytes(device, kind)
            yield Figure(name, current)
            yield Figure(_since_reset(name), peak)
        else:
            reason = Words("noCount", "torch keeps no such count on $1", device.type)
            yield Figure(name, None, reason)


def _driver_figures(device: torch.device) -> Iterator[Figure]:
    names = (
        Words("driverUsed", "driver used on the device"),
        Words("otherProcesses", "other processes and driver contexts"),
    )
    reason = Words("noOwnMemory", "a $1 device has no memory of its own", device.type)
    if hasattr(getattr(torch, device.type, None), "mem_get_info"):
        try:
            yield from map(Figure, names, driver_bytes(device))
            return
        except (RuntimeError, AssertionError) as error:
            reason = Words("noDriver", "the driver does not answer ($1)", type(error).__name__)
    yield from (Figure(name, None, reason) for name in names)


def _aimdo_figures(device: torch.device) -> Iterator[Figure]:
    if not memory.aimdo_enabled:
        return
    import comfy_aimdo.control as aimdo  # hosts without dynamic VRAM have none

    name = Words("aimdoCount", "comfy-aimdo's count, all cards")
    try:
        yield Figure(name, aimdo.get_total_vram_usage())
    except (AttributeError, RuntimeError) as error:
        reason = Words("noAimdo", "comfy-aimdo does not answer ($1)", type(error).__name__)
        yield Figure(name, None, reason)
    yield Figure(Words("copyBuffers", "copy buffers of dynamic VRAM"), copy_buffer_bytes(device))


def _model_figures(patcher: Any) -> Iterator[Figure]:
    name = type(patcher.model).__name__
    loaded, whole = patcher.loaded_size(), patcher.model_size()
    yield Figure(Words("onDeviceOf", "$1: weights on the device", name), loaded)
    yield Figure(Words("elsewhereOf", "$1: weights elsewhere", name), max(0, whole - loaded))
    if is_dynamic(patcher):
        yield Figure(Words("pagesOf", "$1: pages resident", name), resident_page_bytes(patcher))


def _pinned() -> Figure:
    name = Words("pinned", "pinned RAM of ComfyUI")
    total = getattr(management, "TOTAL_PINNED_MEMORY", None)
    if total is None:
        return Figure(name, None, Words("notCounted", "this ComfyUI does not count it"))
    if getattr(management, "MAX_PINNED_MEMORY", -1) <= 0:
        reason = Words("pinsNothing", "ComfyUI pins no memory on this machine")
        return Figure(name, None, reason)
    return Figure(name, int(total))


def _process_gauge() -> Gauge:
    """The resident memory of this process, and the highest that the system remembers.

    What a process has freed may stay resident and be used again: then nothing rises.
    """
    if _STATUS.exists():
        reset = _reset_peak if os.access(_CLEAR_REFS, os.W_OK) else None
        return Gauge(_read_status, reset, _PROCESS)
    if sys.platform == "win32":

        def read() -> Count:
            info = psutil.Process().memory_info()
            return Count(info.rss, info.peak_wset)

        return Gauge(read, None, Words("workingSet", "RAM of the process (working set)"))
    return Gauge(_rss, None, Words("atReadings", "$1, at the readings only", _PROCESS))


def _rss() -> Count:
    """The resident memory now, where the system remembers no peak."""
    rss = psutil.Process().memory_info().rss
    return Count(rss, rss)


def _read_status() -> Count:
    found = _HWM_AND_RSS.search(_STATUS.read_bytes())
    if found is None:  # some containers leave the lines out
        return _rss()
    peak, current = (int(number) * 1024 for number in found.groups())
    return Count(current, max(current, peak))


def _reset_peak() -> None:
    with suppress(OSError):
        _CLEAR_REFS.write_bytes(b"5")  # 5: the peak alone, see the kernel's proc(5)
