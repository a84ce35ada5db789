"""Counts what the last block of each stack of a family's transformer asks of a card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pack.testing.families import Call, FakeFamily
from pack.testing.launches import Counts, Launches
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)


class StackRun(NamedTuple):
    """What the last block of a stack asked of the card, and its launches by name."""

    counts: Counts
    operations: Counter[str]


def run_stacks(
    fake: FakeFamily, call: Call, stacks: tuple[str, ...], patcher: Any = None
) -> dict[str, StackRun]:
    """By stack, what its last block did in one forward."""
    seen = Launches()
    found: dict[str, StackRun] = {}

    def counted(called: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with seen, _noted(fake.model.diffusion_model, stacks, seen, found):
                return called(*args, **kwargs)

        return run

    fake.measure(call, patcher=patcher, around=counted)
    return found


@contextmanager
def _noted(
    denoiser: Any, stacks: tuple[str, ...], seen: Launches, found: dict[str, StackRun]
) -> Iterator[None]:
    """The hooks are no block's own: a block with hooks would not be taken in pieces."""
    last = {getattr(denoiser, stack)[-1]: stack for stack in stacks}
    begun: list[tuple[Counts, Counter[str]]] = []

    def begin(module: torch.nn.Module, given: Any) -> None:
        if module in last:
            begun.append((seen.counts, seen.operations.copy()))

    def end(module: torch.nn.Module, given: Any, result: Any) -> None:
        if module in last:
            counts, operations = begun.pop()
            found[last[module]] = StackRun(seen.counts - counts, seen.operations - operations)

    handles = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
