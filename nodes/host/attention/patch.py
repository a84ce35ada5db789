"""Puts our slicing between a model and its attention, and leaves word for the lean block."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention as attention
import comfy.model_base
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...attention.budget import AUTO_HEADS, BUDGET_BYTES, block_heads
from ...units import MIB
from ..base.options import OPTIONS_KEY, SLICE
from ..base.server import NodeLog
from .call import AttentionCall
from .slicer import attend

_OVERRIDE = "optimized_attention_override"
# Functions that hold no scores, and those that do.
_WITHOUT_SCORES = (
    "attention_pytorch",
    "attention_flash",
    "attention_xformers",
    "attention_comfy_kitchen_int8",
)
_WITH_SCORES = ("attention_basic", "attention_split", "attention_sub_quad")

_UNASKED = (
    "nothing was sliced: {} has no place for attention patches, or a later node replaced this one: "
    "place this node last"
)
_UNUSED = "the attention that the checkpoint chose is not used: this node replaces it"
# How the lean Z-Image block cuts its heads, by mode.
_LEAN = {"auto": f"{AUTO_HEADS} heads", "max": "one head", "heads": "slice_size heads"}


def with_attention_slice(
    model: ModelPatcher, *, mode: str, size: int, node_id: str | None
) -> ModelPatcher:
    """Returns a clone whose attention is computed in slices; the model is left as it is.

    Args:
        size: of a slice, in heads or queries; 0 for half.
        node_id: the node that shows the decisions.
    """
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    log = NodeLog("Attention Slice", node_id)
    is_called = False  # since a sampling began
    previous = options.get(_OVERRIDE)
    is_foreign = previous is not None and getattr(previous, "is_foreign", True)
    chosen = getattr(previous, "chosen", None)
    if is_foreign and (chosen := _chosen_by_host(previous)) is not None:
        previous, is_foreign = None, False

    # A closure, so that clones of the model share it.
    def override(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_called
        is_called = True
        function = chosen or function
        try:
            call = AttentionCall(function, args, kwargs, previous=previous, is_foreign=is_foreign)
        except ValueError:
            log.say_once("unknown", "not sliced: a call has unknown arguments")
            if previous is not None:
                return previous(function, *args, **kwargs)
            return function(*args, **kwargs)
        return attend(call, log, mode=mode, size=size)

    ours: Any = override
    ours.is_foreign, ours.chosen = is_foreign, chosen
    options[_OVERRIDE] = ours
    options[OPTIONS_KEY] = {**options.get(OPTIONS_KEY, {}), SLICE: block_heads(mode, size)}
    family = type(clone.model).__name__

    def outer_sample(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal is_called
        is_called = False
        result = executor(*args, **kwargs)
        if not is_called:
            log.say_once("unasked", _UNASKED.format(family), logging.WARNING)
        return result

    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{OPTIONS_KEY}.{SLICE}", outer_sample)
    log.say_once("expected", _expected(clone, chosen, is_foreign, mode, size))
    if _has_preferences(clone):
        log.say_once("unused", _UNUSED, logging.WARNING)
    return clone


def _chosen_by_host(override: Any) -> Callable[..., Any] | None:
    """The function that the host's Model Attention Backend put in; None for another override."""
    if not inspect.isfunction(override) or override.__module__ != comfy.model_patcher.__name__:
        return None
    return inspect.getclosurevars(override).nonlocals.get("optimized_attention")


def holds_scores() -> bool:
    """Whether the attention that the host has chosen keeps a matrix of scores."""
    return attention.optimized_attention.__name__ in _WITH_SCORES


def _has_preferences(model: ModelPatcher) -> bool:
    """Whether the checkpoint chose the attention of a layer, which hosts after 0.33.0 let it."""
    kind = getattr(attention, "ComfyAttention", ())
    return any(isinstance(m, kind) and m.function is not None for m in model.model.modules())


def _expected(
    model: ModelPatcher,
    chosen: Callable[..., Any] | None,
    is_foreign: bool,
    mode: str,
    size: int,
) -> str:
    """What can be said before the first call: model and backend are known, sizes are not."""
    name = (chosen or attention.optimized_attention).__name__
    where = f"{name} on {model.load_device}"
    if mode == "auto" and is_foreign:
        line = "auto: an override of another pack computes the attention, nothing will be sliced"
    elif mode == "auto" and name in _WITH_SCORES:
        budget = f"{BUDGET_BYTES / MIB:.0f} MiB"
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
