"""While a block computes, the next block's weights are on their way, by the host's own queue.

Hosts without one (before 0.2x) copy each weight when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..base.options import OPTIONS_KEY, PREFETCH

try:
    import comfy.model_prefetch as model_prefetch
except ImportError:
    model_prefetch = None

HAS_PREFETCH = model_prefetch is not None


@contextmanager
def prefetching(
    blocks: Sequence[Any], device: torch.device, transformer_options: Mapping[str, Any]
) -> Iterator[Callable[[Any], None]]:
    """Yields what is to be called before each block, in that order.

    The host copies all weights of the block that have no page into one buffer, in a stream of its
    own. It has two, so that a block is copied while the one before computes.

    Memory: two buffers of a block's weights, where those have no page of dynamic VRAM.
    """
    asked = transformer_options.get(OPTIONS_KEY, {}).get(PREFETCH, True)
    queue = None
    if model_prefetch is not None and asked:
        queue = model_prefetch.make_prefetch_queue(list(blocks), device, transformer_options)
    if model_prefetch is None or queue is None:
        yield lambda block: None
        return
    pop = model_prefetch.prefetch_queue_pop
    try:
        yield lambda block: pop(queue, device, block)
        pop(queue, device, None)
    except BaseException:
        # Else the next forward would take what lies in the buffers for its own.
        model_prefetch.cleanup_prefetch_queues()
        raise
