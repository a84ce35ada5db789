"""Puts our slicing between a model and its attention, and tells the lean block what was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_base
import torch
from comfy.patcher_extension import WrappersMP

from . import notice
from .attention_call import AttentionCall

logger = logging.getLogger(__name__)

# What our nodes tell one another inside transformer_options: plain data, one entry for each node.
OPTIONS_KEY = "z_image_low_vram"
_SLICE = "attention_slice"
FIT = "fit_to_vram"
_IS_GROUPED = "is_grouped"
_OVERRIDE = "optimized_attention_override"

# Heads in one of the lean Z-Image block's groups with mode auto: the knee of memory against time.
LEAN_HEADS = 10
# Functions that hold no scores, and those that do.
_WITHOUT_SCORES = ("attention_pytorch", "attention_flash", "attention_xformers")
_WITH_SCORES = ("attention_basic", "attention_split", "attention_sub_quad")

_UNASKED = (
    "nothing was sliced: {} offers its attention to no patch, or a later node's override has "
    "replaced this one"
)
# How the lean Z-Image block cuts its heads, by mode.
_LEAN = {"auto": f"{LEAN_HEADS} heads", "max": "one head", "heads": "so many heads"}

Slicer = Callable[[AttentionCall, "Reporter"], torch.Tensor]


class Reporter:
    """Says each kind of decision once, in the log and on the node."""

    def __init__(self, node_id: str | None) -> None:
        self.was_asked = False  # whether an attention call came since a sampling began
        self._node_id = node_id
        self._lines: dict[str, str] = {}

    def say(self, kind: str, line: Callable[[], str], level: int = logging.INFO) -> None:
        """Logs the line and adds it to the node's text, unless that kind was said before."""
        # A compiled graph is not broken for a line of text.
        if torch.compiler.is_compiling() or kind in self._lines:
            return
        self._lines[kind] = line()
        logger.log(level, "Attention Slice: %s", self._lines[kind])
        notice.show_text(self._node_id, "\n".join(self._lines.values()))


def with_attention_slice(
    model: Any, slicer: Slicer, *, mode: str, size: int, budget_bytes: int, node_id: str | None
) -> Any:
    """Returns a clone of the model whose attention calls go through `slicer`.

    Args:
        model: a ModelPatcher; left as it is.
        slicer: computes one call; gets the call and who to tell.
        mode: kept for the lean block, see `head_groups`.
        size: the same.
        budget_bytes: what mode auto keeps to, for the text.
        node_id: the node that shows the decisions.
    """
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    reporter = Reporter(node_id)
    override = _override(slicer, options.get(_OVERRIDE), reporter)
    asked = {"mode": mode, "size": size}
    options[OPTIONS_KEY] = {**options.get(OPTIONS_KEY, {}), _SLICE: asked}
    options[_OVERRIDE] = override
    watch = _watch(reporter, type(clone.model).__name__)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{OPTIONS_KEY}.{_SLICE}", watch)
    budget = f"{budget_bytes / 2**20:.0f} MiB"
    reporter.say("expected", lambda: _expected(clone, override.is_foreign, mode, size, budget))
    return clone


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
    fitted, asked = told.get(FIT, 1), told.get(_SLICE)
    if asked is None or asked["mode"] == "queries":
        return fitted
    of_mode = {"auto": LEAN_HEADS, "max": 1, "heads": asked["size"] or -(-heads // 2)}
    return max(fitted, -(-heads // min(heads, of_mode[asked["mode"]])))


def holds_scores() -> bool:
    """Whether the attention that the host has chosen keeps a matrix of scores."""
    return attention.optimized_attention.__name__ in _WITH_SCORES


def within_groups(transformer_options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for the attention calls of a block that honours `head_groups`.

    Marks that the heads are cut, so that modes heads and queries do not take half of what is left
    (size 0) once more. Sizes in numbers, max and auto hold for a group as for any other call.
    """
    asked = transformer_options.get(OPTIONS_KEY)
    if not asked or _SLICE not in asked:
        return dict(transformer_options)
    return {**transformer_options, OPTIONS_KEY: {**asked, _IS_GROUPED: True}}


def is_grouped(call: AttentionCall) -> bool:
    """True for a call of a block that cut its heads itself, see `within_groups`."""
    return bool(call.transformer_options.get(OPTIONS_KEY, {}).get(_IS_GROUPED, False))


def _override(slicer: Slicer, previous: Callable[..., Any] | None, reporter: Reporter) -> Any:
    """Our function for the host's slot; a closure, so that clones of the model share it."""

    is_foreign = previous is not None and getattr(previous, "is_foreign", True)

    def override(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reporter.was_asked = True
        try:
            call = AttentionCall(function, args, kwargs, previous=previous, is_foreign=is_foreign)
        except ValueError:
            reporter.say("unknown", lambda: "a call with unknown arguments: not sliced")
            if previous is not None:
                return previous(function, *args, **kwargs)
            return function(*args, **kwargs)
        return slicer(call, reporter)

    override.is_foreign = is_foreign
    return override


def _watch(reporter: Reporter, family: str) -> Callable[..., Any]:
    """Wraps a whole sampling: says so if the model did not ask for its attention once."""

    def outer_sample(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        reporter.was_asked = False
        result = executor(*args, **kwargs)
        if not reporter.was_asked:
            reporter.say("unasked", lambda: _UNASKED.format(family), logging.WARNING)
        return result

    return outer_sample


def _expected(model: Any, is_foreign: bool, mode: str, size: int, budget: str) -> str:
    """What can be said before the first call: model and backend are known, sizes are not."""
    name = attention.optimized_attention.__name__
    where = f"{name} on {model.load_device}"
    if mode == "auto" and is_foreign:
        line = "auto: an override of another pack computes the attention, nothing will be sliced"
    elif mode == "auto" and name in _WITH_SCORES:
        line = f"auto: {where} holds scores, sliced where they exceed {budget}"
    elif mode == "auto" and name in _WITHOUT_SCORES:
        line = f"auto: {where} holds no scores unless it falls back, nothing to slice"
    elif mode == "auto":
        line = f"auto: {where}, decided at the first call"
    elif mode == "max":
        line = f"max: one head at a time, {where}"
    else:
        line = f"{mode}: {size or 'half of the'} {mode} at a time, {where}"
    if mode in _LEAN and isinstance(model.model, comfy.model_base.Lumina2):
        line += f"; with Apply Gradient Checkpoint, q, k and v of {_LEAN[mode]} at a time"
    if size and mode in ("auto", "max"):
        line += "; slice_size is not used"
    return line
