"""Counts the bytes of live tensor storages, operation by operation: the peak of any piece of code.

| name | unit | what it counts |
|---|---|---|
| `current_bytes`, `peak_bytes`, `nbytes` | bytes | `UntypedStorage.nbytes()`, not rounded |
| `born`, `died` | ticks | allocations and frees so far |

Works the same on real tensors and under FakeTensorMode, where a full-size forward costs no memory.

Why not torch's own MemTracker (torch.distributed._tools): it was compared. It does not see the
scores of math attention, which are made inside of one composite operation, and it takes twice as
long for each operation.

Known limitations:

- What an operation allocates inside and frees before it returns is not seen: kernel workspaces
  (convolutions above all), and the temporaries of custom operations. Composite operations are taken
  apart, so that the tensors between their steps count, also under inference_mode.
- The allocator's rounding, caching and fragmentation are not seen: allocated, not reserved.
- A storage in a reference cycle dies when Python collects it; on the device it is the same.
- Tensors made without the dispatcher (`torch.from_numpy`) or on other threads are not seen.
- A storage resized without the dispatcher (`untyped_storage().resize_`) has its new size from the
  next operation that returns it.
"""

from __future__ import annotations

import functools
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .operations import LIFT_FRESH, device_type_of, has_wrapper, way_of

_USUAL = (torch.Tensor, torch.nn.Parameter)
_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep


@dataclass(slots=True)
class Allocation:
    """One storage, from the operation that returned it to its end.

    op: the operation's name, such as ``aten.mm.default``.
    nbytes: size of the storage in bytes.
    born: tick at which it was allocated.
    shape, dtype: of the tensor that came with it; others may look at the same storage.
    where: innermost caller outside torch, as ``file.py:line function``; empty without `trace`.
    died: tick at which it was freed; None if it was alive when the tracker was left.
    """

    op: str
    nbytes: int
    born: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    died: int | None = None


class PeakTracker(TorchDispatchMode):
    """Counts every storage that an operation returns while the tracker is entered, once.

    Views and results written in place add nothing. Tensors that were there before are ignored.
    `current_bytes` follows the storages to their end, also after the with block; the peak and the
    log are those of the with block.

        with PeakTracker() as tracker:
            model(x)
        print(tracker.peak_bytes, tracker.peak_op)

    Args:
        log: keeps every allocation in `log`.
        trace: notes the calling line with each allocation (slower).
        device: counts only storages on devices of that type, such as "cuda"; None counts all.

    Memory: tracked storages are held weakly; without `log` only the live ones have an entry.
    Exact: to the byte, within the limitations named at the top of this file.
    """

    def __init__(
        self, *, log: bool = False, trace: bool = False, device: str | None = None
    ) -> None:
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self.peak_op = ""
        self.peak_live: tuple[Allocation, ...] = ()
        self.log: list[Allocation] = []
        self._keeps_log = log
        self._traces = trace
        self._device = device
        self._depth = 0
        self._tick = 0
        # StorageImpl address -> (weak reference whose callback removes the entry, its allocation).
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Allocation]] = {}

    def restart_peak(self) -> None:
        """Begins a new peak at what is alive now; what was the peak before is forgotten here."""
        self.peak_bytes, self.peak_op = self.current_bytes, ""
        self.peak_live = self.live()

    def live(self) -> tuple[Allocation, ...]:
        """Returns what is alive now, oldest first."""
        return tuple(allocation for _, allocation in self._live.values())

    def __enter__(self) -> PeakTracker:
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented if has_wrapper(types) else self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        key, makes = way_of(func, device_type_of(args))
        if key is not None:
            with self:
                return func._op_dk(key, *args, **kwargs)
        out = func(*args, **kwargs)
        if makes:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given: set[int] | None = None
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            entry = self._live.get(storage._cdata)
            if entry is not None:
                if entry[1].nbytes != storage.nbytes():  # resize_, or an out= that was too small
                    self._remove(storage._cdata)
                    self._add(storage, _name_of(func), tensor)
                continue
            if not self._is_counted(storage):
                continue
            if given is None:
                inputs = () if func is LIFT_FRESH else (args, kwargs)
                given = {t.untyped_storage()._cdata for t in tensors_in(inputs)}
            if storage._cdata not in given:  # else a view of a tensor that was there before
                self._add(storage, _name_of(func), tensor)
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_op = self.current_bytes, _name_of(func)
            self.peak_live = self.live()

    def _is_counted(self, storage: torch.UntypedStorage) -> bool:
        return self._device is None or storage.device.type == self._device

    def _add(self, storage: torch.UntypedStorage, op: str, tensor: torch.Tensor) -> None:
        shape, where = tuple(tensor.shape), _caller() if self._traces else ""
        allocation = Allocation(op, storage.nbytes(), self._tick, shape, tensor.dtype, where)
        key = storage._cdata
        self._live[key] = (weakref.ref(storage, lambda _: self._remove(key)), allocation)
        self._tick += 1
        self.current_bytes += allocation.nbytes
        if self._keeps_log:
            self.log.append(allocation)

    def _remove(self, key: int) -> None:
        _, allocation = self._live.pop(key)
        self.current_bytes -= allocation.nbytes
        if self._depth > 0:
            allocation.died = self._tick
            self._tick += 1


@functools.cache
def _name_of(func: Any) -> str:
    return str(func)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yields every tensor with a storage in nested tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        if type(tree) not in _USUAL and is_traceable_wrapper_subclass(tree):
            for name in tree.__tensor_flatten__()[0]:
                yield from tensors_in(getattr(tree, name))
        elif tree.layout is torch.strided:
            yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(item)


def _caller() -> str:
    """Returns the innermost frame outside torch and this file, as ``file.py:line function``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith(_TORCH_DIR):
            return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
