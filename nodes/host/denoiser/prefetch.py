"""While a block computes, the next block's weights are on their way, by the host's own queue.

Hosts without one copy each weight by itself, when it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch

from ..base.options import OPTIONS_KEY, PREFETCH
from .projections import is_fetched_once

try:
    import comfy.model_prefetch as model_prefetch
except ImportError:
    model_prefetch = None

# What the host sets for models of dynamic VRAM.
_IS_DYNAMIC = "prefetch_dynamic_vbars"
# Without a plan, the host's own models are prefetched on any card, and so are ours where the
# buffers take at most this share of it: of 2.75 GiB, in bfloat16.
SHARE = 1 / 4


def can_prefetch(device: torch.device) -> bool:
    """Whether the host prefetches blocks there, of a model whose weights are in pages."""
    if model_prefetch is None:
        return False
    # It says None where it does not; else this empty one goes at the end of the node.
    return model_prefetch.make_prefetch_queue([], device, {_IS_DYNAMIC: True}) is not None


@contextmanager
def prefetching(
    blocks: Sequence[Any], device: torch.device, transformer_options: Mapping[str, Any]
) -> Iterator[Callable[[Any], None]]:
    """Yields what is to be called before each block, in that order.

    The host copies all weights of the block that have no page into one buffer, in a stream of its
    own. It has two of both. A block's copies are asked for once the CPU has issued the block
    before, and wait only for the block before that, whose buffer they write over.

    Memory: two buffers of a block's weights, where those have no page of dynamic VRAM.
    """
    queue = None
    if model_prefetch is not None and _is_asked(blocks, device, transformer_options):
        fetched = [block if _is_fetched_once(block) else None for block in blocks]
        queue = model_prefetch.make_prefetch_queue(fetched, device, transformer_options)
    if model_prefetch is None or queue is None:
        yield lambda block: None
        return
    pop = model_prefetch.prefetch_queue_pop
    try:
        yield lambda block: pop(queue, device, block)
        pop(queue, device, None)
    except BaseException:
        # Else the next forward would take what lies in the buffers for its own, and pages stay
        # pinned to the end of the node. The host's own way leaves out the block at whose copies the
        # error came.
        model_prefetch.cleanup_prefetch_queues()
        layers = [layer for block in blocks for layer in block.modules() if hasattr(layer, "_v")]
        model_prefetch.cleanup_prefetched_modules(layers)
        raise


def _is_asked(
    blocks: Sequence[Any], device: torch.device, transformer_options: Mapping[str, Any]
) -> bool:
    """What Fit to VRAM planned; without a plan, whether the card is large enough."""
    if not transformer_options.get(_IS_DYNAMIC):
        return False
    planned = transformer_options.get(OPTIONS_KEY, {}).get(PREFETCH)
    if planned is not None:
        return planned
    largest = max((sum(p.nbytes for p in block.parameters()) for block in blocks), default=0)
    return 2 * largest <= SHARE * comfy.model_management.get_total_memory(device)


def _is_fetched_once(block: Any) -> bool:
    """Whether each layer of the block is.

    The host adds a LoRA to a prefetched weight in its buffer, each time that the weight is used.
    """
    feed, attention = block.feed_forward, block.attention
    return all(map(is_fetched_once, (attention.qkv, attention.out, feed.w1, feed.w2, feed.w3)))
