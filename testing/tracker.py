"""The tracker of the VRAM Probe, with what only tests and benchmarks ask of it."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from pack.nodes.probe.operations import device_type_of
from pack.nodes.probe.tracker import PeakTracker, tensors_in
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd
_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default
_MASK_ELEMENTS = 8  # rows of a mask begin at a multiple of so many for the efficient kernel


class Lifetime(NamedTuple):
    """Size in bytes, and ticks until the free (None: outlived the tracker's with block)."""

    nbytes: int
    ticks: int | None


class Tracker(PeakTracker):
    """Counts as `PeakTracker` does, and also tensors of before that are handed to `watch`.

        with Tracker(attention="flash") as tracker:
            tracker.watch(x)
            model(x)
        print(tracker.peak_bytes, tracker.peak_op)

    Args:
        attention: "flash", "efficient" or "math" runs torch's scaled_dot_product_attention with
            that kernel and raises where it cannot; None leaves the choice to torch, which is flash
            for CPU tensors, fake ones too, unless the mask has three dimensions. Flash counts its
            output and the logsumexp (4 bytes per query and head), efficient its output and a mask
            that it pads, math its scores, in float32 for half types.
        opened: namespaces of custom operations written in Python that run in view, instead of
            counting as their outputs: "comfy_kitchen" shows the float32 copies of its eager form.
        on: counts only what is on devices of that type, fake tensors too, whose storages do not say
            where they are.
        log, device: as for `PeakTracker`.
    """

    def __init__(
        self,
        *,
        attention: Literal["flash", "efficient", "math"] | None = None,
        opened: Collection[str] = (),
        on: str | None = None,
        log: bool = False,
        device: str | None = None,
    ) -> None:
        if attention is not None and attention not in _BACKENDS:
            raise ValueError(f"attention must be flash, efficient, math or None, got {attention!r}")
        super().__init__(log=log, device=device)
        self._attention, self._opened, self._on = attention, frozenset(opened), on
        self._kernel = ExitStack()

    def watch(self, *tensors: torch.Tensor) -> None:
        """Counts the storages of tensors that were made outside, from now to their end."""
        for tensor in tensors_in(tensors):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._live and self._is_counted(storage):
                self._add(storage, "watch", tensor)
        if self.current_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_op = self.current_bytes, "watch"
            self.peak_live = self.live()

    def sequence(self) -> tuple[Lifetime, ...]:
        """Returns size and lifetime of every allocation, in order; needs `log=True`.

        Two calls with equal sequences made the same allocations and frees in the same order.
        """
        if not self._keeps_log:
            raise ValueError("sequence() needs Tracker(log=True)")
        return tuple(
            Lifetime(a.nbytes, None if a.died is None else a.died - a.born) for a in self.log
        )

    def __enter__(self) -> Tracker:
        if self._depth == 0 and self._attention is not None:
            self._kernel.enter_context(sdpa_kernel(_BACKENDS[self._attention]))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if self._depth == 0:
            self._kernel.close()

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if self._on is not None:
            out = [tensor for tensor in tensors_in(out) if tensor.device.type == self._on]
        super()._count(func, args, kwargs, out)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        is_fake = (
            func is _SDPA and device_type_of(args) == "cuda" and isinstance(args[0], FakeTensor)
        )
        # Torch would ask the device, which need not be here.
        if is_fake and self._attention == "flash" and _mask_of(args, kwargs) is None:
            with self:
                return _FLASH(*args[:3], scale=kwargs.get("scale"))[0]
        if is_fake and self._attention == "efficient":
            with self:
                return _efficient(*args[:3], _mask_of(args, kwargs), kwargs.get("scale"))
        if func.namespace in self._opened and _is_written_in_python(func):
            with self:
                return func._op_dk(_EXPLICIT, *args, **kwargs)
        return super()._run(func, args, kwargs)


def _is_written_in_python(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _EXPLICIT.name)


def _mask_of(args: Any, kwargs: Any) -> torch.Tensor | None:
    return kwargs.get("attn_mask", args[3] if len(args) > 3 else None)


def _efficient(q: Any, k: Any, v: Any, mask: torch.Tensor | None, scale: float | None) -> Any:
    """Source: preprocess_mask in torch's aten/src/ATen/native/transformers/attention.cpp."""
    if mask is not None:
        if beyond := mask.shape[-1] % _MASK_ELEMENTS:
            padded = torch.nn.functional.pad(mask, (0, _MASK_ELEMENTS - beyond))
            mask = padded[..., : mask.shape[-1]]
        mask = mask.expand(*q.shape[:3], k.shape[2])
    return _EFFICIENT(q, k, v, mask, False, scale=scale)[0]
