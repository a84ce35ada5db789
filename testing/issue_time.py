"""Time in which one CPU thread issues operations: the real dispatcher, no card, no arithmetic.

`Issued` replaces the kernels of the meta device for the operations of a recorded run: each only
makes its result, from sizes that were recorded. So a call on meta tensors costs the Python of the
caller, torch's dispatcher and a few microseconds for each launch, about what a card's kernels cost
to issue. A card's driver is not in it. Good for comparing two ways on one machine, not as a time.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from pack.nodes.probe.operations import device_type_of, way_of
from pack.nodes.probe.tracker import tensors_in
from pack.testing.launches import is_free
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Composite operations that are one kernel on a card, and many steps on the meta device.
_WHOLE = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.rms_norm.default,
)
# What other programs take does not count; Windows counts threads in steps of 16 ms.
_now = time.perf_counter if sys.platform == "win32" else time.thread_time
T = TypeVar("T")
# Puts something around a function.
Around = Callable[[Callable[..., Any]], Callable[..., Any]]


class Recorded(TorchDispatchMode):
    """Remembers the results of every launch, by operation and sizes of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[Any, dict[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _WHOLE:
            key, _ = way_of(func, device_type_of(args))
            if key is not None:
                with self:
                    return func._op_dk(key, *args, **kwargs)
        out = func(*args, **kwargs)
        is_on_card = any(t.device.type == "cuda" for t in tensors_in((args, kwargs, out)))
        # The meta device takes other composite operations apart.
        if is_on_card and not is_free(func) and (func in _WHOLE or not _is_composite(func)):
            known = self.known.setdefault(func, {})
            for has_strides in (True, False):
                known[_sizes((args, kwargs), has_strides)] = [_made(v) for v in _listed(out)]
        return out

    @contextmanager
    def as_kernels(self) -> Iterator[None]:
        """Operations on meta tensors only make what was recorded, inside the context.

        Only once in a process, and no fake tensors after it: torch forgets the kernels, but still
        calls them under a dispatch mode.
        """
        libraries = {}
        for func, known in self.known.items():
            namespace, name = func.name().split("::")
            if namespace not in libraries:
                libraries[namespace] = Library(namespace, "IMPL")
            # torch refuses kernels of the meta device for composite operations.
            key = "CompositeImplicitAutograd" if func in _WHOLE else "Meta"
            libraries[namespace].impl(name, _kernel(func, known), key, allow_override=True)
        try:
            yield
        finally:
            for library in libraries.values():
                library._destroy()


def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd.name
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


def _kernel(func: Any, known: dict[Any, Any]) -> Callable[..., Any]:
    """What an operation does on the card's side of a launch: nothing but its result."""
    results = func._schema.returns
    given = [index for r in results if (index := _index_of_written(func, r)) is not None]
    if not results:  # it writes into its arguments
        return lambda *args, **kwargs: None
    if len(given) == len(results):
        names = [func._schema.arguments[index].name for index in given]

        def in_place(*args: Any, **kwargs: Any) -> Any:
            values = [
                kwargs[name] if name in kwargs else args[index]
                for name, index in zip(names, given, strict=True)
            ]
            return values[0] if len(values) == 1 else tuple(values)

        return in_place

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args, kwargs
        recorded = known.get(_sizes(given, True)) or known[_sizes(given, False)]
        made = [
            torch.empty_strided(r[0], r[1], dtype=r[2], device=r[3]) if type(r) is tuple else r
            for r in recorded
        ]
        return made[0] if len(results) == 1 else tuple(made)

    return kernel


def _index_of_written(func: Any, result: Any) -> int | None:
    """Which argument an operation returns, written in place."""
    if result.alias_info is None:
        return None
    for index, argument in enumerate(func._schema.arguments):
        info = argument.alias_info
        if info is not None and info.is_write and info.before_set == result.alias_info.before_set:
            return index
    return None


def _sizes(values: Any, has_strides: bool) -> tuple[Any, ...]:
    """What a result depends on: sizes and dtypes of tensors, and all else but devices.

    A stride may differ on the meta device, where the result's no longer matters.
    """
    if isinstance(values, dict):
        values = values.values()
    return tuple(
        [
            (v.shape, v.dtype, v.stride() if has_strides else None)
            if isinstance(v, torch.Tensor)
            else _sizes(v, has_strides)
            if isinstance(v, list | tuple | dict)
            else v
            for v in values
            if not isinstance(v, torch.device)
        ]
    )


def _made(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    device = "cpu" if value.device.type == "cpu" else "meta"
    return tuple(value.shape), value.stride(), value.dtype, device


def _listed(out: Any) -> list[Any]:
    return list(out) if isinstance(out, list | tuple) else [out]


class IssueTimes:
    """Times ways of the same work in turns, so that all meet the same load of the machine.

    Record and add all first, and time them as the last thing of a process, see `as_kernels`.
    """

    def __init__(self) -> None:
        self._recorded = Recorded()
        self._ways: dict[Hashable, Callable[[_Clock], None]] = {}

    def record(self, run: Callable[[Around], T]) -> T:
        """Runs a way on fake CUDA tensors; returns what it does.

        Args:
            run: gets what to put around the function that will be timed.
        """
        with self._recorded:  # also what prepares it
            return run(_within(self._recorded))

    def add(self, key: Hashable, run: Callable[[Around], Any]) -> None:
        """Adds a recorded way, which `run` does on meta tensors."""
        self._ways[key] = lambda clock: run(_within(clock))

    def seconds(self, repeats: int) -> dict[Hashable, list[float]]:
        """Seconds of each way in each of that many turns."""
        found: dict[Hashable, list[float]] = {key: [] for key in self._ways}
        with self._recorded.as_kernels():
            for turn in range(repeats + 1):
                for key, run in self._ways.items():
                    run(clock := _Clock())
                    if turn > 0:  # the first fills caches
                        found[key].append(clock.seconds)
        return found


class _Clock:
    """Counts the seconds inside it, without dispatch modes and default devices from outside."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._until = ExitStack()

    def __enter__(self) -> None:
        self._until.enter_context(_disable_current_modes())
        self._until.enter_context(torch._C.DisableTorchFunction())
        self._until.callback(gc.enable)
        gc.disable()
        self._start = _now()

    def __exit__(self, *exc: Any) -> None:
        self.seconds = _now() - self._start
        self._until.close()


def _within(context: AbstractContextManager[Any]) -> Around:
    """Calls a function inside a context."""

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with context:
                return call(*args, **kwargs)

        return run

    return around
