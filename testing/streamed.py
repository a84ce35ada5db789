"""A denoiser of full width under dynamic VRAM on the fake card: what is copied, when, and where to.

The host's classes and functions run as they are (ModelPatcherDynamic, comfy.ops, the prefetch
queue), over the real comfy-aimdo, so that pages and buffers are the library's own. Stood for are
the driver (fake_cuda.c), the tensors (fake ones, of full size), and CUDA's streams: `Stream` notes
which operation waits for which. So it is seen whether a copy may run while something computes, and
whether a weight could be overwritten before it is read. How long anything takes is not seen.

Weights are not pinned, as with --disable-pinned-memory. Use it inside `on_fake_card`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from pack.nodes.denoiser.sizes import Request
from pack.nodes.host.base.block_events import add_observer
from pack.nodes.host.base.options import OPTIONS_KEY
from pack.nodes.probe.operations import has_wrapper
from pack.nodes.probe.tracker import tensors_in
from pack.testing.fake_card import FakeCard
from pack.testing.families import Call, FakeFamily
from pack.testing.launches import is_free
from pack.testing.stock_forward import FakeDenoiser
from pack.testing.tracker import Tracker
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

DEVICE = torch.device("cuda", 0)


class Stream:
    """A CUDA stream that notes what its next operation comes after.

    clock: by stream, how many of its operations are done before that one.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self.cuda_stream = 0
        self.clock: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: Stream) -> None:
        for stream, count in other.clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def synchronize(self) -> None:
        """The CPU waits, so that whatever it issues then comes after."""
        for stream in self._order.streams:
            stream.wait_stream(self)

    @contextmanager
    def as_context(self, stream: Stream) -> Iterator[None]:
        before, self._order.current = self._order.current, stream
        try:
            yield
        finally:
            self._order.current = before


class Access(NamedTuple):
    """An operation that reads or writes a weight on the card.

    clock: of its stream, itself included.
    block: how many blocks of the forward had ended.
    fetch: a number for what was fetched to that place together.
    begin, end: the place on the card.
    """

    stream: Stream
    clock: dict[Stream, int]
    block: int
    fetch: int
    begin: int
    end: int
    is_write: bool

    def is_after(self, other: Access) -> bool:
        """Whether the streams let it begin only after the other one is done."""
        return self.clock.get(other.stream, 0) >= other.clock[other.stream]

    def meets(self, other: Access) -> bool:
        """Whether they share a place, to which one of them writes."""
        is_same = self.begin < other.end and other.begin < self.end
        return is_same and (self.is_write or other.is_write)


class Order(TorchDispatchMode):
    """While it is entered, notes all accesses to weights on the card.

    accesses: in the order in which the CPU issued them. faults: pairs of them that may run in
    either order where one writes, or of which the second reads what the first has written over its
    weight. on_operation: called after each operation.
    """

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.compute = self.current = Stream(self)
        self.copiers = [Stream(self), Stream(self)]
        self.streams = [self.compute, *self.copiers]
        self.accesses: list[Access] = []
        self.faults: list[tuple[Access, Access]] = []
        self.block = 0
        self.on_fetch: Callable[[], None] = lambda: None
        self._mode = mode
        # By storage: its place on the card. The tensors are kept, so that no other storage gets
        # the address of one.
        self._places: dict[int, tuple[int, int, int]] = {}
        self._kept: list[torch.Tensor] = []
        self._last: list[Access] = []  # without those that a later write is after

    def ended(self) -> None:
        """Tells that a block has ended."""
        self.block += 1

    def tensor_at(self, address: int, size: int, device: torch.device) -> torch.Tensor:
        """A tensor that stands for a place on the card; no allocation of torch's."""
        self.on_fetch()
        with _disable_current_modes(), self._mode:
            made = torch.empty(size, dtype=torch.uint8, device=device)
        self._places[made.untyped_storage()._cdata] = (len(self._kept), address, address + size)
        self._kept.append(made)
        return made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if has_wrapper(types):
            return NotImplemented
        out = func(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        if not is_free(func) and any(t.device.type == "cuda" for t in given):
            clock = self.current.clock
            clock[self.current] += 1
            written = args[0] if func._schema.arguments[0].is_write else None
            for tensor in given:
                place = self._places.get(tensor.untyped_storage()._cdata)
                if place is not None:
                    self._note(place, is_write=tensor is written)
        return out

    def _note(self, place: tuple[int, int, int], *, is_write: bool) -> None:
        made = Access(self.current, dict(self.current.clock), self.block, *place, is_write)
        for other in reversed(self._last):
            is_own = other.fetch == made.fetch
            if made.meets(other):
                if not made.is_after(other) or not (is_write or is_own):
                    self.faults.append((other, made))
                if is_own and not is_write:
                    break  # the copy, which is after whatever was there before it
        if is_write:
            self._last = [a for a in self._last if a.begin < made.begin or a.end > made.end]
        self._last.append(made)
        self.accesses.append(made)


@contextmanager
def installed(order: Order) -> Iterator[None]:
    """While it is open, the host's streams and the places on the card are those of `order`."""
    import comfy.model_management as management
    import comfy_aimdo.torch
    from comfy.cli_args import args

    with ExitStack() as undo:
        for owner, name, value in (
            (management, "NUM_STREAMS", len(order.copiers)),
            (args, "disable_pinned_memory", True),
            (torch.cuda, "current_stream", lambda device=None: order.compute),
            (comfy_aimdo.torch, "get_tensor_from_raw_ptr", order.tensor_at),
        ):
            undo.enter_context(mock.patch.object(owner, name, value))
        undo.enter_context(mock.patch.dict(management.STREAMS, {DEVICE: order.copiers}))
        yield


class Streamed:
    """A denoiser of fake weights in RAM, on the fake card that is there.

    patcher: the host's ModelPatcherDynamic of it. order: what its forwards do to weights. tracker:
    what the last forward held of the card besides.
    """

    tracker: Tracker

    def __init__(self, card: FakeCard, denoiser: FakeDenoiser | FakeFamily) -> None:
        import comfy.memory_management as memory
        from comfy.model_patcher import ModelPatcherDynamic

        memory.aimdo_enabled = True  # as main.py does where comfy-aimdo started
        self.card, self.denoiser, self.order = card, denoiser, Order(denoiser.mode)
        with denoiser.mode:
            self.patcher = ModelPatcherDynamic(denoiser.model, DEVICE, torch.device("cpu"))
        options = denoiser.patcher().model_options["transformer_options"]
        self.patcher.model_options["transformer_options"].update(options)

    @property
    def pages(self) -> Any:
        return self.denoiser.model.dynamic_vbars[DEVICE]

    def load(self, patcher: Any, limit_bytes: int) -> None:
        """As before a sampling, with at most that many bytes of weights in pages."""
        with self.denoiser.mode:
            patcher.patch_model(load_weights=False)
            patcher.load(DEVICE)
        self.pages.set_watermark(limit_bytes)

    def forward(self, patcher: Any, request: Request | Call, **asked: Any) -> list[Access]:
        """One forward of the loaded patcher; `asked` are options of our nodes.

        Returns:
            Its accesses, also those before an error.
        """
        import comfy.model_management as management

        order, clone = self.order, patcher.clone()
        measure: Callable[..., Tracker] = self.denoiser.measure
        options = clone.model_options["transformer_options"]
        options[OPTIONS_KEY] = {**options.get(OPTIONS_KEY, {}), **asked}
        add_observer(clone.model_options, lambda name: order.ended())
        order.block, order.accesses = 0, []

        def noted(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                with order:
                    return call(*args, **kwargs)

            return run

        total = mock.patch.object(
            management, "get_total_memory", lambda device: self.card.size_bytes
        )
        with installed(order), total:
            self.tracker = measure(request, patcher=clone, route="apply", around=noted)
        return order.accesses

    def end_node(self) -> None:
        """As execution.py does, also after an error."""
        import comfy.model_management as management

        management.reset_cast_buffers()
        self.order.compute.synchronize()  # as torch.cuda.synchronize
