"""Attention Slice: attention a few heads or queries at a time, for every model."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .attention.budget import BUDGET_BYTES, MODES
from .host.attention.patch import with_attention_slice
from .units import MIB


class AttentionSlice(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageAttentionSlice",
            display_name="Attention Slice",
            category="model/patch/z-image",
            description=(
                "Computes attention a few heads or a few queries at a time, with the same result "
                "up to rounding. Saves memory where scores are kept (sub-quadratic, split, basic "
                "attention, PyTorch's math kernel); flash-like kernels keep none. With Apply "
                "Gradient Checkpoint on Z-Image it also cuts q, k and v into groups of heads."
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
            outputs=[io.Model.Output(tooltip="The model with sliced attention, for a sampler.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, mode: str = "auto", slices: int = 0) -> io.NodeOutput:
        node_id = cls.hidden.unique_id if cls.hidden else None
        return io.NodeOutput(with_attention_slice(model, mode=mode, size=slices, node_id=node_id))
