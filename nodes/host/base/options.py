"""What our nodes tell one another inside transformer_options: plain data, one entry each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OPTIONS_KEY = "z_image_low_vram"
SLICE, FIT = "attention_slice", "fit_to_vram"
_IS_GROUPED = "is_grouped"
# Heads in one of the lean Z-Image block's groups with mode auto: the knee of memory against time.
LEAN_HEADS = 10


def head_groups(transformer_options: Mapping[str, Any], heads: int) -> int:
    """Returns into how many groups a block that computes q, k, v itself should cut its heads.

    Mode auto asks for groups of LEAN_HEADS heads, max for one head, heads for groups of its size
    (0: two groups); queries, and a model without the node, for one group of all heads. Fit to VRAM
    asks for a number of groups; the larger one counts.

    Args:
        transformer_options: the request's.
        heads: the block's heads; those of key and value where query heads share them.
    """
    told = transformer_options.get(OPTIONS_KEY, {})
    fitted, asked = told.get(FIT, 1), told.get(SLICE)
    if asked is None or asked["mode"] == "queries":
        return fitted
    of_mode = {"auto": LEAN_HEADS, "max": 1, "heads": asked["size"] or -(-heads // 2)}
    return max(fitted, -(-heads // min(heads, of_mode[asked["mode"]])))


def within_groups(transformer_options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for the attention calls of a block that honours `head_groups`.

    Marks that the heads are cut, so that modes heads and queries do not take half of what is left
    (size 0) once more. Sizes in numbers, max and auto hold for a group as for any other call.
    """
    asked = transformer_options.get(OPTIONS_KEY)
    if not asked or SLICE not in asked:
        return dict(transformer_options)
    return {**transformer_options, OPTIONS_KEY: {**asked, _IS_GROUPED: True}}


def is_grouped(transformer_options: Mapping[str, Any]) -> bool:
    """True for a call of a block that cut its heads itself, see `within_groups`."""
    return bool(transformer_options.get(OPTIONS_KEY, {}).get(_IS_GROUPED, False))
