"""The card's memory as the driver sees it, from outside the measured process, without a context."""

from __future__ import annotations

import functools
import os
import threading
from typing import Any, NamedTuple

INTERVAL_S = 0.01


def driver_version() -> str | None:
    """The NVIDIA driver's version; None where there is none."""
    card = _card()
    return None if card is None else _text(card.nvml.nvmlSystemGetDriverVersion())


def device_name() -> str | None:
    """The card's name, the same as torch's."""
    card = _card()
    return None if card is None else _text(card.nvml.nvmlDeviceGetName(card.handle))


def total_bytes() -> int | None:
    """The memory of the first visible card; None without a driver."""
    card = _card()
    return None if card is None else int(card.nvml.nvmlDeviceGetMemoryInfo(card.handle).total)


def used_bytes() -> int | None:
    """What all programs and the driver hold of the first visible card now.

    Returns:
        Bytes; None where no driver answers or nvidia-ml-py is missing.
    """
    card = _card()
    return None if card is None else card.used_bytes()


def free_bytes() -> int | None:
    """What is free of the first visible card now."""
    card = _card()
    return None if card is None else int(card.nvml.nvmlDeviceGetMemoryInfo(card.handle).free)


class DriverPeak:
    """Samples the card while it is open: `with DriverPeak(before) as peak: ...; peak.bytes`.

    before_bytes: what was in use already; None where no driver answers.
    bytes: the most that was in use, less `before_bytes`; None without a driver.
    The card must be ours alone: what other programs take meanwhile counts too, and a peak that is
    shorter than 10 ms can be missed.
    """

    def __init__(self, before_bytes: int | None) -> None:
        self._card = None if before_bytes is None else _card()
        self._before = before_bytes or 0
        self._highest = 0
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def bytes(self) -> int | None:
        return None if self._card is None else max(0, self._highest - self._before)

    def restart(self) -> None:
        """Forgets the peak so far."""
        with self._lock:  # else a sample that is being taken brings the old peak back
            self._highest = 0
        self._take()

    def __enter__(self) -> DriverPeak:
        if self._card is not None:
            self.restart()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _sample(self) -> None:
        while not self._end.wait(INTERVAL_S):
            self._take()

    def _take(self) -> None:
        card = self._card
        if card is None:
            return
        with self._lock:
            try:
                self._highest = max(self._highest, card.used_bytes())
            except card.nvml.NVMLError:
                self._card = None  # A partial peak is worthless: report none.
                self._end.set()


class _Card(NamedTuple):
    """nvidia-ml-py and its handle of a card."""

    nvml: Any
    handle: Any

    def used_bytes(self) -> int:
        # Version 1 of the query: the driver's own reserve counts as used, always the same.
        return int(self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used)


@functools.cache
def _card() -> _Card | None:
    """The first card that CUDA sees; None where the package or the driver is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return _Card(pynvml, _handle(pynvml))
    except Exception:  # ImportError, or an NVMLError of a class that is not there either
        return None


def _handle(nvml: Any) -> Any:
    """NVML counts all cards; CUDA_VISIBLE_DEVICES may show torch another first one.

    A number is NVML's own where CUDA_DEVICE_ORDER is PCI_BUS_ID or all cards are alike.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(first))
    if first.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(first)
    # CUDA takes any beginning of an identifier that only one card has.
    every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    (handle,) = (h for h in every if _text(nvml.nvmlDeviceGetUUID(h)).startswith(first))
    return handle


def _text(said: str | bytes) -> str:
    """What NVML says; an old nvidia-ml-py gives bytes."""
    return said.decode() if isinstance(said, bytes) else said
