"""What our nodes leave for one another inside transformer_options: plain data, one entry each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTIONS_KEY = "z_image_low_vram"
# Of Attention Slice: the heads in a group, 0 for half of them, None for all.
SLICE = "attention_slice"
# Of Fit to VRAM: its choice for the denoiser.
FIT = "fit_to_vram"
# Of Fit to VRAM: whether blocks are prefetched, which takes room for two.
PREFETCH = "prefetch"
_IS_GROUPED = "is_grouped"


def asked_groups(transformer_options: Mapping[str, Any], heads: int) -> int:
    """Into how many groups a block that computes q, k, v itself should cut its heads.

    What Attention Slice asks for; 1 without it.

    Args:
        transformer_options: the request's.
        heads: the block's heads; those of key and value where query heads share them.
    """
    asked = transformer_options.get(OPTIONS_KEY, {})
    sliced = asked.get(SLICE)
    if sliced is None:
        sliced = heads
    sliced = min(heads, sliced or -(-heads // 2))
    return -(-heads // sliced)


def within_groups(transformer_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for the attention calls of a block that honours `asked_groups`.

    Marks that the heads are cut, so that Attention Slice does not halve them again. Modes with a
    size of their own treat a group like any other call.
    """
    asked = transformer_options.get(OPTIONS_KEY)
    if not asked or SLICE not in asked:
        return dict(transformer_options)
    return {**transformer_options, OPTIONS_KEY: {**asked, _IS_GROUPED: True}}


def is_grouped(transformer_options: Mapping[str, Any]) -> bool:
    """True for a call of a block that cut its heads itself, see `within_groups`."""
    return bool(transformer_options.get(OPTIONS_KEY, {}).get(_IS_GROUPED, False))
