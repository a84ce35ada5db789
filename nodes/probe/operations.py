"""How the tracker runs an operation, so that the tensors between its steps are seen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = torch._C._disabled_torch_dispatch_impl
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_EXPLICIT = torch._C.DispatchKey.CompositeExplicitAutograd
# The softmax of math attention is no composite to autograd, but one to the devices: it allocates in
# three steps.
_SAFE_SOFTMAX = torch.ops.aten._safe_softmax.default
# `torch.tensor(data)` fills a storage outside the dispatcher and shows it here first.
LIFT_FRESH = torch.ops.aten.lift_fresh.default


def has_wrapper(types: Iterable[Any]) -> bool:
    """Whether one is a wrapper (a quantised tensor), whose inner operations come back."""
    return any(kind is not FakeTensor and kind.__torch_dispatch__ is not _PLAIN for kind in types)


def device_type_of(args: Any) -> str:
    """Returns where an operation runs, by its first tensor; empty for one that makes a tensor."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
    return ""


@cache
def way_of(func: Any, device_type: str) -> tuple[Any, bool]:
    """Returns how `func` is run.

    An operation with a kernel of the device's own is one step there, composite or not.

    Returns:
        The dispatch key under which it runs as steps that can be seen, or None; and whether it may
        return a storage that is not known yet.
    """
    if func.namespace == "prim":  # asks a fake tensor for its device
        return None, False
    if func is _SAFE_SOFTMAX:
        return _EXPLICIT, True
    own_kernel = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    has_own = own_kernel is not None and _has_kernel(func, own_kernel)
    if _has_kernel(func, _COMPOSITE.name) and not has_own:
        return _COMPOSITE, True
    # By its schema, a view looks at its input and makes nothing.
    is_view = func.is_view and func.namespace == "aten" and func is not LIFT_FRESH
    return None, not is_view


def _has_kernel(func: Any, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
