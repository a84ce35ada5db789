"""Puts our slicing between a model and its attention, and tells the lean block what was asked."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_base
import torch
from comfy.patcher_extension import WrappersMP

from ..base import server
from ..base.options import LEAN_HEADS, OPTIONS_KEY, SLICE
from .call import AttentionCall

logger = logging.getLogger(__name__)

_OVERRIDE = "optimized_attention_override"

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
        server.show_text(self._node_id, "\n".join(self._lines.values()))


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
    options[OPTIONS_KEY] = {**options.get(OPTIONS_KEY, {}), SLICE: asked}
    options[_OVERRIDE] = override
    watch = _watch(reporter, type(clone.model).__name__)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{OPTIONS_KEY}.{SLICE}", watch)
    budget = f"{budget_bytes / 2**20:.0f} MiB"
    reporter.say("expected", lambda: _expected(clone, override.is_foreign, mode, size, budget))
    return clone


def holds_scores() -> bool:
    """Whether the attention that the host has chosen keeps a matrix of scores."""
    return attention.optimized_attention.__name__ in _WITH_SCORES


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
