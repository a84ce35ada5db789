"""Checks by tensor names that a stack of equal blocks is complete."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .header import TensorInfo, WeightsError

_BLOCK = re.compile(r"(\d{1,6})\.(.+\.(?:weight|bias))")


def count_blocks(label: str, tensors: Mapping[str, TensorInfo], prefix: str) -> int:
    """Counts the blocks ``{prefix}0.``, ``{prefix}1.``, ... and checks that none lacks a tensor.

    The blocks of a stack are alike, so a weight or bias that one of them has, each must have.

    Args:
        label: the component's name, for the message.
        prefix: the names' text before the block's number, such as ``layers.``.

    Raises:
        WeightsError: no block, a gap in the numbers, or a tensor missing in one of them.
    """
    blocks: dict[int, set[str]] = {}
    for name in tensors:
        match = _BLOCK.fullmatch(name, len(prefix)) if name.startswith(prefix) else None
        if match:
            blocks.setdefault(int(match.group(1)), set()).add(match.group(2))
    wanted = set().union(*blocks.values())
    for number in range(max(len(blocks), 1)):
        if number not in blocks:
            raise WeightsError(f"{label} lacks {prefix}{number}: download it again")
        lacking = wanted - blocks[number]
        if lacking:
            name = f"{prefix}{number}.{min(lacking)}"
            raise WeightsError(f"{label} lacks the tensor {name}: download it again")
    return len(blocks)


def extent(label: str, tensors: Mapping[str, TensorInfo], name: str, axis: int = 0) -> int:
    """The extent of a tensor along an axis.

    Raises:
        WeightsError: there is no such tensor or axis.
    """
    info = tensors.get(name)
    if info is None or len(info.shape) <= axis:
        raise WeightsError(f"{label} lacks the tensor {name}: download it again")
    return info.shape[axis]
