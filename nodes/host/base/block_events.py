"""Notifies observers when a block of a model finishes.

Blocks are the members of a model's lists of modules, in every family. They have hooks during one
forward at a time. A forward of ours that never calls its blocks notifies through the request's
options, see `block_ended`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .options import OPTIONS_KEY

_OBSERVER = "block_observer"
# Gets the name of a block, such as "layers.3", when it has ended.
Observer = Callable[[str], None]


def add_observer(model_options: dict[str, Any], observer: Observer) -> None:
    """Adds an observer for forwards that call no block, beside those that are already there."""
    options = model_options.setdefault("transformer_options", {})
    asked = options.get(OPTIONS_KEY, {})
    previous = asked.get(_OBSERVER)

    def both(name: str) -> None:
        if previous is not None:
            previous(name)
        observer(name)

    options[OPTIONS_KEY] = {**asked, _OBSERVER: both}


def block_ended(transformer_options: Mapping[str, Any], name: str) -> None:
    """Notifies that a block has ended, for a forward that does not call it as a module."""
    observer = transformer_options.get(OPTIONS_KEY, {}).get(_OBSERVER)
    if observer is not None:
        observer(name)


def blocks_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every block, in the model's order."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _called(name, child)
        else:
            yield from ((f"{name}.{inner}", block) for inner, block in blocks_of(child))


@contextmanager
def watched(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Keeps hooks on the blocks inside the context."""
    with ExitStack() as until:
        for name, block in blocks_of(model):
            handle = block.register_forward_hook(_hook(name, observer))
            until.callback(handle.remove)
        yield


def _called(name: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A block, or its parts where the host calls those one by one (a UNet's sequences)."""
    if isinstance(block, nn.Sequential | nn.ModuleList):
        for index, part in enumerate(block):
            yield from _called(f"{name}.{index}", part)
    else:
        yield name, block


def _hook(name: str, observer: Observer) -> Callable[..., None]:
    def ended(module: nn.Module, args: Any, output: Any) -> None:
        # A compiled graph has no blocks.
        if not torch.compiler.is_compiling():
            observer(name)

    return ended
