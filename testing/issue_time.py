"""Time in which one CPU thread issues operations: the real dispatcher, no card, no arithmetic.

`Issued` replaces the kernels of the meta device for the operations of a recorded run: each only
makes its result, from sizes that were recorded. So a call on meta tensors costs the Python of the
caller, torch's dispatcher and a few microseconds for each launch, about what a card's kernels cost
to issue. A card's driver is not in it. Good for comparing two ways on one machine, not as a time.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from pack.nodes.denoiser.sizes import Request
from pack.nodes.probe.operations import device_type_of, way_of
from pack.nodes.probe.tracker import tensors_in
from pack.testing.launches import is_free
from pack.testing.stock_forward import FakeDenoiser
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Composite operations that are one kernel on a card, and many steps on the meta device.
_WHOLE = (
    torch.ops.aten.scaled_dot_product_attention.default,
    torch.ops.aten.rms_norm.default,
)
# Main layers of the two forwards whose difference is timed.
LAYERS = (2, 10)


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
        if is_on_card and not is_free(func):
            sizes = _sizes(args), _sizes(kwargs.values())
            self.known.setdefault(func, {})[sizes] = [_made(value) for value in _listed(out)]
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


def _kernel(func: Any, known: dict[Any, Any]) -> Callable[..., Any]:
    """What an operation does on the card's side of a launch: nothing but its result."""
    results = func._schema.returns
    given = [index for r in results if (index := _index_of_written(func, r)) is not None]
    if given and len(given) == len(results):
        names = [func._schema.arguments[index].name for index in given]

        def in_place(*args: Any, **kwargs: Any) -> Any:
            values = [
                kwargs[name] if name in kwargs else args[index]
                for name, index in zip(names, given, strict=True)
            ]
            return values[0] if len(values) == 1 else tuple(values)

        return in_place

    def kernel(*args: Any, **kwargs: Any) -> Any:
        made = [
            torch.empty_strided(r[0], r[1], dtype=r[2], device=r[3]) if type(r) is tuple else r
            for r in known[_sizes(args), _sizes(kwargs.values())]
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


def _sizes(values: Iterable[Any]) -> tuple[Any, ...]:
    """What a result depends on: sizes and dtypes of tensors, and all else but devices."""
    return tuple(
        [
            (v.shape, v.dtype)
            if isinstance(v, torch.Tensor)
            else _sizes(v)
            if isinstance(v, list | tuple)
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


def main_block_seconds(
    denoiser: FakeDenoiser,
    requests: Sequence[Request],
    ways: Mapping[str, Callable[[Any], Any]],
    *,
    repeats: int,
) -> dict[tuple[Request, str], list[float]]:
    """Seconds in which one thread issues one main block, by request and way, `repeats` times.

    One block is the difference between forwards of `LAYERS` main layers. The ways take turns, so
    that all meet the same load of the machine.

    Args:
        denoiser: on fake CUDA tensors, plain weights.
        requests: sizes of the calls.
        ways: name -> makes the patched model of a ModelPatcher.
    """
    recorded = Recorded()
    for request, patched in itertools.product(requests, ways.values()):
        denoiser.measure(request, patcher=patched(denoiser.patcher()), around=_within(recorded))
    models = [
        FakeDenoiser(replace(denoiser.sizes, layers=n), dtype=denoiser.dtype, device="meta")
        for n in LAYERS
    ]
    found: dict[tuple[Request, str], list[float]] = {}
    with recorded.as_kernels():
        for request, turn in itertools.product(requests, range(repeats + 1)):
            for name, patched in ways.items():
                few, many = (_seconds(m, request, patched(m.patcher())) for m in models)
                if turn > 0:  # the first fills caches
                    seconds = (many - few) / (LAYERS[1] - LAYERS[0])
                    found.setdefault((request, name), []).append(seconds)
    return found


def _seconds(denoiser: FakeDenoiser, request: Request, patcher: Any) -> float:
    """Seconds of one forward, without the tracker and the default device around it."""
    spent = 0.0

    @contextmanager
    def timed() -> Iterator[None]:
        nonlocal spent
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            gc.disable()
            try:
                start = time.perf_counter()
                yield
                spent = time.perf_counter() - start
            finally:
                gc.enable()

    denoiser.measure(request, patcher=patcher, around=_within(timed()))
    return spent


def _within(context: AbstractContextManager[Any]) -> Callable[..., Callable[..., Any]]:
    """Calls the transformer inside a context."""

    def around(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with context:
                return call(*args, **kwargs)

        return run

    return around
