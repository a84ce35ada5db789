"""Counts what an operation asks of a card: launches, host waits, bytes moved and arithmetic.

| name | unit | what it counts |
|---|---|---|
| `launches` | calls | operations on CUDA tensors, without views and bare allocations |
| `host_waits` | calls | operations that let the CPU wait until the card has finished |
| `moved_bytes` | bytes | tensors on the card that launches read and write |
| `row_bytes` | bytes | of them, all but what hides behind the arithmetic of the launch |
| `copied_bytes` | bytes | tensors that are copied between the card and RAM |
| `flops` | operations | multiplications and additions of products, attention and convolutions |

Works the same on real and on fake CUDA tensors, also under inference_mode: composite operations are
taken apart. torch's scaled_dot_product_attention is one launch. A convolution with a bias is two,
because torch adds the bias to what cuDNN returns. What else a library launches inside of one
operation is not seen: split sums of cuBLAS, layout changes of cuDNN. A fused operation of
comfy-kitchen is one launch with no arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import torch
from pack.nodes.denoiser.sizes import Request
from pack.nodes.host.base.block_events import add_observer
from pack.nodes.probe.operations import device_type_of, has_wrapper, way_of
from pack.nodes.probe.tracker import tensors_in
from pack.testing.stock_forward import FakeDenoiser
from pack.testing.tracker import Tracker
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
# They change what torch knows of a tensor, and nothing on the card.
_NO_LAUNCH = {"_unsafe_view", "lift_fresh", "resize_", "set_", "record_stream", "is_pinned"}
_EMPTY = ("empty", "new_empty", "_empty")
_COPIES = {"copy_", "_to_copy"}
_WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}
# They write their first argument without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_"}
# They read as much as they write, however large the table.
_GATHERS = {"index_select", "embedding", "gather"}
# Where the weight is among the arguments of a product.
_WEIGHTS = {"mm": (1,), "addmm": (2,), "convolution": (1,)}
_SYNCHRONIZE = (torch.cuda, torch.cuda.Stream, torch.cuda.Event)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a run asked of the card; the table at the top of this file says what each counts."""

    launches: int = 0
    host_waits: int = 0
    moved_bytes: int = 0
    row_bytes: int = 0
    copied_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Counts) -> Counts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(mine + theirs for mine, theirs in pairs))

    def __sub__(self, other: Counts) -> Counts:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Counts(*(mine - theirs for mine, theirs in pairs))


class Launches(TorchDispatchMode):
    """Counts while it is entered.

        with Launches() as seen:
            model(x)
        print(seen.counts.launches, seen.operations.most_common(5))

    counts: the sums. operations: launches by name, such as ``aten.mm``. convolutions: each pair of
    input shape and weight shape that was seen. Enter a Tracker before it to run attention of fake
    tensors as flash and to have the peak of the same run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.operations: Counter[str] = Counter()
        self.convolutions: set[tuple[torch.Size, torch.Size]] = set()
        self._depth = 0
        self._undo = ExitStack()

    def __enter__(self) -> Launches:
        if self._depth == 0:
            for owner in _SYNCHRONIZE:
                told = self._told(owner.synchronize)
                self._undo.enter_context(mock.patch.object(owner, "synchronize", told))
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._depth -= 1
        if self._depth == 0:
            self._undo.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if has_wrapper(types):
            return NotImplemented
        if func is not _SDPA:
            key, _ = way_of(func, device_type_of(args))
            if key is not None:
                with self:
                    return func._op_dk(key, *args, **kwargs)
        out = func(*args, **kwargs)
        if not is_free(func):
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        made = list(tensors_in(out))
        devices = {t.device.type for t in (*tensors_in((args, kwargs)), *made)}
        if "cuda" not in devices:
            return
        copied, waits = 0, name in _WAITS
        if name in _COPIES and len(devices) > 1:
            copied, waits = _nbytes(made), not _is_non_blocking(func, args, kwargs)
        read = [] if name in _GATHERS else _read(func, args, kwargs)
        launches, written = 1, _card_bytes(made)
        moved = _card_bytes(read) + written * (2 if name in _GATHERS else 1)
        flops = _flops(func, args, kwargs, out)
        # Products hide all but the weights that they read.
        rows = moved if not flops else _card_bytes([args[i] for i in _WEIGHTS.get(name, ())])
        if name == "convolution":
            self.convolutions.add((args[0].shape, args[1].shape))
            if args[2] is not None:
                launches, moved, rows = 2, moved + 2 * written, rows + 2 * written
        self.counts += Counts(launches, int(waits), moved, rows, copied, flops)
        self.operations[str(func.overloadpacket)] += launches

    def _told(self, synchronize: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts += Counts(host_waits=1)
            return synchronize(*args, **kwargs)

        return counted


@cache
def is_free(func: Any) -> bool:
    """Whether an operation starts nothing on the card."""
    name = func.overloadpacket.__name__
    is_bare = name.startswith(_EMPTY) or name in _NO_LAUNCH
    return func.namespace == "prim" or is_bare or (func.is_view and func.namespace == "aten")


def _read(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that an operation reads: not what it only writes."""
    first = 1 if func.overloadpacket.__name__ in _OVERWRITES else 0
    outs = {argument.name for argument in func._schema.arguments if argument.is_out}
    return list(tensors_in((args[first:], {k: v for k, v in kwargs.items() if k not in outs})))


def _is_non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("non_blocking", False)


def _nbytes(tensors: list[torch.Tensor]) -> int:
    # An expanded tensor is read once. Fake tensors whose sizes depend on values count as nothing.
    known = [t for t in tensors if isinstance(t.numel(), int)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in known)


def _card_bytes(tensors: list[torch.Tensor]) -> int:
    return _nbytes([t for t in tensors if t.device.type == "cuda"])


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func is _SDPA:
        return flop_registry[_FLASH](*args[:3], out_val=out)
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=out) if formula else 0


class BlockRun(NamedTuple):
    """One forward.

    block: what the last main block asked of the card.
    forward: what the whole forward did.
    operations: launches of the last main block by name.
    tracker: what the forward held.
    """

    block: Counts
    forward: Counts
    operations: Counter[str]
    tracker: Tracker


def run_main_block(
    denoiser: FakeDenoiser,
    request: Request,
    patcher: Any = None,
    *,
    around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
    **tracking: Any,
) -> BlockRun:
    """Counts one main block (`layers.N`), from the end of the one before it.

    Args:
        denoiser: with 2 main layers or more; 2 are enough.
        request: sizes of the call.
        patcher: a clone of `denoiser.patcher()` that nodes patched; None counts the host.
        around, tracking: as for `FakeDenoiser.measure`.

    Raises:
        ValueError: not two main blocks have ended.
    """
    patcher = denoiser.patcher() if patcher is None else patcher.clone()
    seen = Launches()
    ends: list[tuple[Counts, Counter[str]]] = []

    def ended(name: str) -> None:
        if name.startswith("layers."):
            ends.append((seen.counts, seen.operations.copy()))

    # A forward that calls no block tells the observer; other forwards are seen by their modules.
    add_observer(patcher.model_options, ended)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        call = call if around is None else around(call)

        def run(*args: Any, **kwargs: Any) -> Any:
            with seen, _block_ends(denoiser, ended):
                return call(*args, **kwargs)

        return run

    tracker = denoiser.measure(request, patcher=patcher, around=counted, **tracking)
    if len(ends) < 2:
        raise ValueError(f"2 main blocks must end, got {len(ends)}")
    (before, earlier), (after, later) = ends[-2:]
    return BlockRun(after - before, seen.counts, later - earlier, tracker)


@contextmanager
def _block_ends(denoiser: FakeDenoiser, ended: Callable[[str], None]) -> Iterator[None]:
    """Calls `ended` after each main block that is called as a module.

    The hook is no block's own: a block with a hook would not be taken by the lean forward.
    """
    layers = denoiser.model.diffusion_model.layers

    def hook(module: Any, args: Any, output: Any) -> None:
        for index, layer in enumerate(layers):
            if module is layer:
                ended(f"layers.{index}")

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
