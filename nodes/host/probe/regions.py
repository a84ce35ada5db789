"""What dynamic VRAM holds on a card, which torch's allocator does not count."""

from __future__ import annotations

import logging
import sys
from typing import Any, NamedTuple

import comfy.memory_management as memory
import torch

from ...probe.counter import Region
from ...units import PAGE_BYTES
from ..base.device import copy_buffer_bytes, is_dynamic, models_on

logger = logging.getLogger(__name__)


class _Pages(NamedTuple):
    """What tells that a model's pages were evicted.

    bytes: of the resident pages.
    top: the last resident page, the first to be evicted; None where there is none.
    number: the driver's of that page.
    watermark: no page from it on is resident.
    evictions: readings that found pages evicted.
    """

    bytes: int
    top: int | None
    number: tuple[int, ...]
    watermark: int
    evictions: int


class Regions:
    """Reads pages and copy buffers of a device, and notices evictions between two readings."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages: dict[int, _Pages] = {}
        self._has_failed = False

    def read(self) -> tuple[Region, ...]:
        """The pages of each model and all copy buffers, as they are now; () without dynamic VRAM.

        What cannot be read counts as evicted: a probe must not end a sampling.
        """
        if not memory.aimdo_enabled:
            return ()
        models = [patcher.model for patcher in models_on(self._device) if is_dynamic(patcher)]
        found = [model.dynamic_vbars.get(self._device) for model in models]
        pages = {id(one): one for one in found if one is not None}
        self._pages = {key: self._try(one, self._pages.get(key)) for key, one in pages.items()}
        return (
            Region(0, copy_buffer_bytes(self._device)),
            *(Region(key, read.bytes, read.evictions) for key, read in self._pages.items()),
        )

    def _try(self, pages: Any, before: _Pages | None) -> _Pages:
        try:
            return _read(pages, before)
        except Exception as error:  # whatever a version of comfy_aimdo raises
            if not self._has_failed:
                logger.warning("VRAM Probe: pages of dynamic VRAM cannot be read: %s", error)
                self._has_failed = True
            return _unknown(0, before)


def _read(pages: Any, before: _Pages | None) -> _Pages:
    """Reads a ModelVBAR and compares it with the reading before.

    Source: comfy_aimdo. An eviction begins with the last page and lowers the watermark, a load
    lifts it, and a page that comes back has another number.
    """
    size = pages.loaded_size()
    if not hasattr(pages, "get_residency"):  # comfy_aimdo before 0.3.0
        return _unknown(size, before)
    resident = {page for page, flags in enumerate(pages.get_residency()) if flags & 1}
    top = max(resident, default=None)
    watermark = pages.get_watermark()
    if before is None:  # new, so it began without a page, and had all of them to itself
        evictions = int(watermark < pages.get_nr_pages())
    else:
        is_gone = before.top is not None and (
            before.top not in resident or _number_of(pages, before.top) != before.number
        )
        evictions = before.evictions + (is_gone or watermark < before.watermark)
    return _Pages(size, top, () if top is None else _number_of(pages, top), watermark, evictions)


def _unknown(size: int, before: _Pages | None) -> _Pages:
    """A reading that counts as an eviction, and so does the next one, by its lower watermark."""
    return _Pages(size, None, (), sys.maxsize, 1 if before is None else before.evictions + 1)


def _number_of(pages: Any, page: int) -> tuple[int, ...]:
    """The number of a resident page. Asking for a resident page moves nothing."""
    place = pages.base_addr + page * PAGE_BYTES
    number = pages.fault(place, 1)
    pages.unpin(place, 1)
    return tuple(number or ())
