"""Counts the bytes of live tensor storages, operation by operation: the peak of any piece of code.

| name | unit | what it counts |
|---|---|---|
| `current_bytes`, `peak_bytes`, `nbytes` | bytes | `UntypedStorage.nbytes()`, not rounded |
| `born`, `died`, `Lifetime.ticks` | ticks | allocations and frees so far |

Works the same on real tensors and under FakeTensorMode, where a full-size forward costs no memory.

Why not torch's own MemTracker (torch.distributed._tools): it was compared. It does not see the
scores of math attention, which are made inside of one composite operation, and it takes twice as
long for each operation.

Known limitations:

- What an operation allocates inside and frees before it returns is not seen: kernel workspaces
  (convolutions above all), and the temporaries of custom operations that are not `opened`.
  Composite operations are taken apart, so that the tensors between their steps count, also under
  inference_mode.
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
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from .operations import LIFT_FRESH, device_type_of, opened_way, way_of

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
_PLAIN = torch._C._disabled_torch_dispatch_impl
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_USUAL = (torch.Tensor, torch.nn.Parameter)
_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep


@dataclass(slots=True)
class Allocation:
    """One storage, from the operation that returned it to its end.

    op: the operation's name, such as ``aten.mm.default``, or ``watch``.
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


class Lifetime(NamedTuple):
    """Size in bytes, and ticks until the free (None: outlived the tracker's with block)."""

    nbytes: int
    ticks: int | None


class PeakTracker(TorchDispatchMode):
    """Counts every storage that an operation returns while the tracker is entered, once.

    Views and results written in place add nothing. Tensors that were there before are ignored,
    unless handed to `watch`. `current_bytes` follows the storages to their end, also after the
    with block; the peak and the log are those of the with block.

        with PeakTracker() as tracker:
            model(x)
        print(tracker.peak_bytes, tracker.peak_op)

    Args:
        attention: "flash" or "math" runs torch's scaled_dot_product_attention with that kernel and
            raises where it cannot; None leaves the choice to torch, which is flash for CPU tensors,
            fake ones too, unless the mask has three dimensions. Flash counts its output and the
            logsumexp (4 bytes per query and head), math its scores, in float32 for half types.
        opened: namespaces of custom operations written in Python that run in view, instead of
            counting as their outputs: "comfy_kitchen" shows the float32 copies of its eager form.
        log: keeps every allocation for `log` and `sequence()`.
        trace: notes the calling line with each allocation (slower).
        device: counts only storages on devices of that type, such as "cuda"; None counts all.

    Memory: tracked storages are held weakly; without `log` only the live ones have an entry.
    Exact: to the byte, within the limitations named at the top of this file.
    """

    def __init__(
        self,
        *,
        attention: Literal["flash", "math"] | None = None,
        opened: Collection[str] = (),
        log: bool = False,
        trace: bool = False,
        device: str | None = None,
    ) -> None:
        if attention is not None and attention not in _BACKENDS:
            raise ValueError(f"attention must be flash, math or None, got {attention!r}")
        super().__init__()
        self.current_bytes = 0
        self.peak_bytes = 0
        self.peak_op = ""
        self.peak_live: tuple[Allocation, ...] = ()
        self.log: list[Allocation] = []
        self._attention = attention
        self._kernel: AbstractContextManager[Any] | None = None
        self._opened = frozenset(opened)
        self._keeps_log = log
        self._traces = trace
        self._device = device
        self._depth = 0
        self._tick = 0
        # StorageImpl address -> (weak reference whose callback removes the entry, its allocation).
        self._live: dict[int, tuple[weakref.ref[torch.UntypedStorage], Allocation]] = {}

    def watch(self, *tensors: torch.Tensor) -> None:
        """Counts the storages of tensors that were made outside, from now to their end."""
        for tensor in _tensors(tensors):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and self._is_counted(storage):
                self._add(storage, "watch", tensor)
        self._note_peak("watch")

    def restart_peak(self) -> None:
        """Begins a new peak at what is alive now; what was the peak before is forgotten here."""
        self.peak_bytes, self.peak_op = self.current_bytes, ""
        self.peak_live = self.live()

    def live(self) -> tuple[Allocation, ...]:
        """Returns what is alive now, oldest first."""
        return tuple(allocation for _, allocation in self._live.values())

    def sequence(self) -> tuple[Lifetime, ...]:
        """Returns size and lifetime of every allocation, in order; needs `log=True`.

        Two calls with equal sequences made the same allocations and frees in the same order.
        """
        if not self._keeps_log:
            raise ValueError("sequence() needs PeakTracker(log=True)")
        return tuple(
            Lifetime(a.nbytes, None if a.died is None else a.died - a.born) for a in self.log
        )

    def __enter__(self) -> PeakTracker:
        if self._depth == 0 and self._attention is not None:
            self._kernel = sdpa_kernel(_BACKENDS[self._attention])
            self._kernel.__enter__()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._depth -= 1
        if self._depth == 0 and self._kernel is not None:
            kernel, self._kernel = self._kernel, None
            kernel.__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if kind is not FakeTensor and kind.__torch_dispatch__ is not _PLAIN:
                # A wrapper (a quantised tensor): it runs its inner operations, which come back.
                return NotImplemented
        kwargs = kwargs or {}
        device_type = device_type_of(args)
        is_named = func is _SDPA and self._attention == "flash" and device_type == "cuda"
        if is_named and isinstance(args[0], FakeTensor) and not _has_mask(args, kwargs):
            with self:  # torch would ask the device, which need not be here
                return _FLASH(*args[:3], scale=kwargs.get("scale"))[0]
        key, makes = way_of(func, device_type)
        if key is None and self._opened and func.namespace in self._opened:
            key = opened_way(func)
        if key is not None:
            with self:
                return func._op_dk(key, *args, **kwargs)
        out = func(*args, **kwargs)
        if makes:
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given: set[int] | None = None
        for tensor in _tensors(out):
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
                given = {t.untyped_storage()._cdata for t in _tensors(inputs)}
            if storage._cdata not in given:  # else a view of a tensor that was there before
                self._add(storage, _name_of(func), tensor)
        if self.current_bytes > self.peak_bytes:
            self._note_peak(_name_of(func))

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

    def _note_peak(self, op: str) -> None:
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_op = self.current_bytes, op
            self.peak_live = self.live()


def _has_mask(args: Any, kwargs: Any) -> bool:
    return kwargs.get("attn_mask", args[3] if len(args) > 3 else None) is not None


@functools.cache
def _name_of(func: Any) -> str:
    return str(func)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yields every tensor with a storage in nested tuples, lists and dicts."""
    if isinstance(tree, torch.Tensor):
        if type(tree) not in _USUAL and is_traceable_wrapper_subclass(tree):
            for name in tree.__tensor_flatten__()[0]:
                yield from _tensors(getattr(tree, name))
        elif tree.layout is torch.strided:
            yield tree
    elif isinstance(tree, (tuple, list, dict)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(item)


def _caller() -> str:
    """Returns the innermost frame outside torch and this file, as ``file.py:line function``."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith(_TORCH_DIR):
            return f"{os.path.basename(path)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
