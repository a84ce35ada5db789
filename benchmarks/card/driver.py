"""The card's memory as the driver sees it, from outside the measured process, without a context."""

from __future__ import annotations

import threading
import time
from typing import Any

INTERVAL_S = 0.01


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    nvml = _nvml()
    return None if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


def used_bytes() -> int | None:
    """What all programs hold of the first card now; None where no driver answers."""
    nvml = _nvml()
    return None if nvml is None else _used(nvml)


def free_bytes() -> int | None:
    """What is free of the first card now."""
    nvml = _nvml()
    if nvml is None:
        return None
    return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(_index())).free)


class DriverPeak:
    """Samples the card while it is open: `with DriverPeak() as peak: ...; peak.bytes`.

    bytes: the most that was in use, less what was in use at the start; None without a driver.
    The card must be ours alone: what other programs take meanwhile counts too, and a peak that is
    shorter than 10 ms can be missed.
    """

    def __init__(self, before_bytes: int | None = None) -> None:
        self._nvml = _nvml()
        self._before = before_bytes
        self._highest = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def bytes(self) -> int | None:
        return None if self._nvml is None else max(0, self._highest - (self._before or 0))

    def restart(self) -> None:
        """Forgets the peak so far."""
        self._highest = 0 if self._nvml is None else _used(self._nvml)

    def __enter__(self) -> DriverPeak:
        if self._nvml is not None:
            if self._before is None:
                self._before = _used(self._nvml)
            self.restart()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._nvml is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._end.is_set():
            self._highest = max(self._highest, _used(self._nvml))
            time.sleep(INTERVAL_S)


def _used(nvml: Any) -> int:
    return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(_index())).used)


def _index() -> int:
    """NVML counts all cards; CUDA_VISIBLE_DEVICES may show torch another first one."""
    import os

    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return int(first) if first.isdecimal() else 0


def _nvml() -> Any:
    """nvidia-ml-py, ready for use; None where the package or the driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # ImportError, or an NVMLError of a class that is not there either
        return None
    return pynvml
