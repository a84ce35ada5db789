"""Attention Slice: attention a few heads or queries at a time, for every model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from comfy_api.latest import io

from .attention.budget import MODES, Workspace, fit, requested, workspace_bytes
from .attention.slices import Geometry, Slices, geometry, sliced_attention
from .host.attention import patch as attention
from .host.attention.backend import backend_of
from .host.attention.call import AttentionCall
from .host.base.options import is_grouped

MIB = 2**20
# What score and q/k/v buffers may take with mode auto: about what Z-Image's lean block holds at
# 1024x1024, so that attention is never far above the rest; the CPU is no slower for it.
BUDGET_BYTES = 128 * MIB


class AttentionSlice(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageAttentionSlice",
            display_name="Attention Slice",
            category="model/patch/z-image",
            description=(
                "Computes attention a few heads or a few queries at a time, with the same result. "
                "Saves memory where scores are kept (sub-quadratic, split, basic attention, "
                "PyTorch's math kernel); flash-like kernels keep none. With Apply Gradient "
                "Checkpoint on Z-Image it also cuts q, k and v into groups of heads."
            ),
            search_aliases=["attention slicing", "sliced attention", "low vram", "split attention"],
            inputs=[
                io.Model.Input("model", tooltip="Any model; it is left as it is."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip=(
                        "auto: slices only where the attention in use holds buffers, in as few "
                        f"slices as keep them below {BUDGET_BYTES // MIB} MiB: two halves of the "
                        "heads, then less, then queries of one head. heads: slice_size heads at a "
                        "time. queries: slice_size queries at a time. max: one head at a time, the "
                        "least memory and the slowest."
                    ),
                ),
                io.Int.Input(
                    "slices",
                    default=0,
                    min=0,
                    max=65536,
                    display_name="slice_size",
                    tooltip=(
                        "As in diffusers, a number is the size of a slice, not how many there are: "
                        "heads (mode heads) or queries (mode queries, rounded up to a multiple of "
                        "64). Smaller saves more memory and is slower. 0 = half. Unused by auto "
                        "and max."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with sliced attention, for a sampler."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, mode: str = "auto", slices: int = 0) -> io.NodeOutput:
        slicer = functools.partial(attend, mode=mode, size=slices)
        node_id = cls.hidden.unique_id if cls.hidden else None
        patched = attention.with_attention_slice(
            model, slicer, mode=mode, size=slices, budget_bytes=BUDGET_BYTES, node_id=node_id
        )
        return io.NodeOutput(patched)


def attend(
    call: AttentionCall, reporter: attention.Reporter, *, mode: str, size: int
) -> torch.Tensor:
    """Computes one attention call of the model, in slices where mode and backend ask for it."""
    layout = {"heads": call.heads, "skip_reshape": call.skip_reshape, "enable_gqa": call.enable_gqa}
    try:
        shape = geometry(call.q, call.k, call.v, call.sliceable_mask, **layout)
    except ValueError as error:
        why = str(error)
        reporter.say("unknown", lambda: f"not sliced: {why}")
        return call.whole()
    is_half = mode in ("heads", "queries") and not size
    if is_half and is_grouped(call.transformer_options):  # halved already
        reporter.say("grouped", lambda: f"groups of {shape.heads}, each with its own q, k and v")
        return call.whole()
    backend = backend_of(call)
    workspace = Workspace(*backend.buffers) if backend.buffers else None
    if mode != "auto":
        slices = requested(shape, mode, size)
    elif workspace:
        slices = fit(shape, workspace, BUDGET_BYTES)
    else:
        slices = Slices(shape.heads, shape.queries)
    if slices == (shape.heads, shape.queries):
        reporter.say(
            f"{backend.name} whole", lambda: f"{backend.name}: {_why_whole(shape, workspace)}"
        )
        return call.whole()
    reporter.say(backend.name, lambda: f"{backend.name}: {_what(shape, slices, workspace)}")
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
        return "what it holds is not known, nothing sliced (heads or max slice it all the same)"
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
