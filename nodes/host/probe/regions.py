"""What dynamic VRAM holds on a card, which torch's allocator does not count."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...probe.counter import Region
from ...units import PAGE_BYTES
from ..base.device import copy_buffers, is_dynamic, models_on


class _Pages(NamedTuple):
    """What tells that a model's pages were evicted.

    top: the last resident page, the first to be evicted; None where there is none.
    number: the driver's of that page.
    watermark: no page from it on is resident.
    evictions: readings that found pages evicted.
    """

    top: int | None
    number: tuple[int, ...]
    watermark: int
    evictions: int


class Regions:
    """Reads pages and copy buffers of a device, and notices evictions between two readings."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pages: dict[int, _Pages] = {}

    def read(self) -> tuple[Region, ...]:
        """The pages of each model and each copy buffer, as they are now."""
        models = [patcher.model for patcher in models_on(self._device) if is_dynamic(patcher)]
        found = [model.dynamic_vbars.get(self._device) for model in models]
        pages = {id(one): one for one in found if one is not None}
        self._pages = {key: _read(one, self._pages.get(key)) for key, one in pages.items()}
        buffers = copy_buffers(self._device)
        return (
            *(Region(k, one.loaded_size(), self._pages[k].evictions) for k, one in pages.items()),
            *(Region(id(one), one.size()) for one in buffers),
        )


def _read(pages: Any, before: _Pages | None) -> _Pages:
    """Reads a ModelVBAR and compares it with the reading before.

    Source: comfy_aimdo. An eviction begins with the last page and lowers the watermark, a load
    lifts it, and a page that comes back has another number.
    """
    if not hasattr(pages, "get_residency"):  # comfy_aimdo before 0.3.0
        return _Pages(None, (), 0, 0 if before is None else before.evictions + 1)
    resident = {page for page, flags in enumerate(pages.get_residency()) if flags & 1}
    top = max(resident, default=None)
    watermark, evictions = pages.get_watermark(), 0
    if before is not None:
        is_gone = before.top is not None and (
            before.top not in resident or _number_of(pages, before.top) != before.number
        )
        evictions = before.evictions + (is_gone or watermark < before.watermark)
    return _Pages(top, () if top is None else _number_of(pages, top), watermark, evictions)


def _number_of(pages: Any, page: int) -> tuple[int, ...]:
    """The number of a resident page. Asking for a resident page moves nothing."""
    place = pages.base_addr + page * PAGE_BYTES
    number = pages.fault(place, 1)
    pages.unpin(place, 1)
    return tuple(number or ())
