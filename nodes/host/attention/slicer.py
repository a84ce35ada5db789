"""Computes one attention call of a model, in slices where mode and backend ask for it."""

from __future__ import annotations

from typing import Any

from ...attention.budget import (
    BUDGET_BYTES,
    Geometry,
    Slices,
    Workspace,
    fit,
    requested,
    workspace_bytes,
)
from ...attention.slices import geometry, sliced_attention
from ...units import MIB
from ..base.options import is_grouped
from ..base.server import NodeLog
from .backend import backend_of
from .call import AttentionCall


def attend(call: AttentionCall, log: NodeLog, *, mode: str, size: int) -> Any:
    """Returns the call's result; says each kind of decision once.

    Args:
        mode: auto, or as for `requested`.
        size: of a slice, in heads or queries; 0 for half.
    """
    layout = {"heads": call.heads, "skip_reshape": call.skip_reshape, "enable_gqa": call.enable_gqa}
    try:
        shape = geometry(call.q, call.k, call.v, call.sliceable_mask, **layout)
    except ValueError as error:
        log.say_once("unknown", f"not sliced: {error}")
        return call.whole()
    is_half = mode in ("heads", "queries") and not size
    if is_half and is_grouped(call.options.get("transformer_options") or {}):  # halved already
        log.say_once("grouped", f"groups of {shape.heads}, each with its own q, k and v")
        return call.whole()
    name, workspace = backend_of(call)
    whole = Slices(shape.heads, shape.queries)
    if mode != "auto":
        slices = requested(shape, mode, size)
    else:
        slices = fit(shape, workspace, BUDGET_BYTES) if workspace else whole
    if slices == whole:
        log.say_once(f"{name} whole", lambda: f"{name}: {_why_whole(shape, workspace)}")
        return call.whole()
    log.say_once(name, lambda: f"{name}: {_what(shape, slices, workspace)}")
    return sliced_attention(
        call.q,
        call.k,
        call.v,
        call.sliceable_mask,
        attend=call.attend,
        slices=slices,
        skip_output_reshape=call.skip_output_reshape,
        **layout,
    )


def _why_whole(shape: Geometry, workspace: Workspace | None) -> str:
    if workspace is None:
        return "its buffers are unknown, nothing sliced (heads or max slice anyway)"
    if not any(workspace[:3]):
        return "holds no scores, nothing to slice"
    held = workspace_bytes(shape, workspace) / MIB
    return f"holds {held:.0f} MiB, nothing sliced"


def _what(shape: Geometry, slices: Slices, workspace: Workspace | None) -> str:
    heads, queries = slices
    text = f"{heads} of {shape.heads} heads"
    if queries < shape.queries:
        text += f", {queries} of {shape.queries} queries"
    text += " at a time"
    if workspace is None:
        return text
    if not any(workspace[:3]):
        return f"{text}; it holds no scores, so this alone saves nothing"
    before, after = workspace_bytes(shape, workspace), workspace_bytes(shape, workspace, slices)
    return f"{text}, buffers {before / MIB:.0f} -> {after / MIB:.0f} MiB"
