"""Tensors that stay on disk until an operation asks for them.

A loader that copies a state dict into a model holds both at once, and with memory-mapped files both
count as resident. A stored tensor is read when it is copied and forgotten afterwards, so the peak
is the model plus one tensor. It is read, not mapped: ComfyUI's --disable-mmap asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

from .blocks import extent
from .component import Component
from .header import WeightsError, read_header

_TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip

# Where a tensor goes: its name in the model, or that name and the slice that it fills there, as
# (axis, start, length).
Target = str | tuple[str, tuple[int, int, int]]


class StoredTensor(torch.Tensor):
    """A tensor with shape and dtype in memory and its values on disk.

    Every operation on it reads the values again and runs on an ordinary tensor. Nothing is kept, so
    an operation that would write into it raises TypeError.

    Memory: 0 bytes; during an operation the tensor's own size.
    Exact: bit-exact.
    """

    _read: Callable[[], torch.Tensor]

    # Without this, torch would wrap the results of operations in this class again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], torch.Tensor]
    ) -> StoredTensor:
        tensor = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype)
        tensor._read = read
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def values(x: Any) -> Any:
            return x._read() if isinstance(x, cls) else x

        # The values read would take the write and be forgotten.
        arguments = func._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | (kwargs or {})
        for argument in arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(given.get(argument.name), cls):
                raise TypeError(f"{func} cannot write into a tensor that lies on disk")
        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"StoredTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def state_dict(
    component: Component, targets: Mapping[str, Target] | None = None
) -> dict[str, torch.Tensor]:
    """A state dict whose values stay on disk until they are copied.

    Args:
        targets: where each tensor goes; a tensor not named keeps its name. Tensors that fill slices
            of the same name are joined when that name is read.

    Returns:
        Stored tensors by their name in the model.

    Raises:
        WeightsError: an element type that torch cannot load, joined tensors that leave a gap, or
            a file that is another one than when the component was opened; by the tensors, where
            it has become too short since.

    Memory: no tensor data.
    Exact: bit-exact.
    """
    _check_unchanged(component)
    whole: dict[str, torch.Tensor] = {}
    parts: dict[str, list[tuple[int, int, str]]] = {}
    for name in component.tensors:
        target = (targets or {}).get(name, name)
        if isinstance(target, str):
            whole[target] = _stored(component, name)
        else:
            joined, (axis, start, _) = target
            parts.setdefault(joined, []).append((axis, start, name))
    for joined, members in parts.items():
        whole[joined] = _joined(component, joined, sorted(members))
    return whole


def _dtype(component: Component, name: str) -> torch.dtype:
    dtype = component.tensors[name].dtype
    if dtype not in _TORCH_DTYPES:
        raise WeightsError(
            f"{component.label} stores {name} as {dtype}, which cannot be loaded from a folder: "
            "use a single file for quantised weights"
        )
    return _TORCH_DTYPES[dtype]


def _check_unchanged(component: Component) -> None:
    # The host may ask for a second copy of the model hours after the component was opened.
    now = {path: read_header(path).tensors for path in component.files}
    for name, info in component.tensors.items():
        if now[component.file_of[name]].get(name) != info:
            raise _changed(component)


def _changed(component: Component) -> WeightsError:
    return WeightsError(f"{component.label} has changed on the disk: run the loader node again")


def _read(component: Component, name: str) -> torch.Tensor:
    info = component.tensors[name]
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    with component.file_of[name].open("rb") as file:
        file.seek(info.start)
        if file.readinto(raw.numpy().data) != info.nbytes:
            raise _changed(component)
    return raw.view(_TORCH_DTYPES[info.dtype]).view(info.shape)


def _stored(component: Component, name: str) -> StoredTensor:
    dtype = _dtype(component, name)
    return StoredTensor(component.tensors[name].shape, dtype, lambda: _read(component, name))


def _joined(
    component: Component, joined: str, members: Sequence[tuple[int, int, str]]
) -> StoredTensor:
    """The members, sorted by their start, as one tensor along their axis."""
    axis = members[0][0]
    first = component.tensors[members[0][2]]
    shape = list(first.shape)
    end = 0
    for _, start, name in members:
        if start != end:
            raise WeightsError(
                f"{component.label} lacks a part of {joined}, the one that begins at {end}: "
                "download it again"
            )
        end += extent(component.label, component.tensors, name, axis)
        shape[axis] = end
        info = component.tensors[name]
        around = (*info.shape[:axis], end, *info.shape[axis + 1 :])
        if info.dtype != first.dtype or around != tuple(shape):
            raise WeightsError(
                f"{component.label} stores {name} as {info.dtype} of shape {list(info.shape)}, "
                f"unlike the other parts of {joined}: download it again"
            )
    names = [name for _, _, name in members]

    def read() -> torch.Tensor:
        return torch.cat([_read(component, name) for name in names], dim=axis)

    return StoredTensor(shape, _dtype(component, names[0]), read)
