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
                "up to rounding. It saves memory where attention stores scores: sub-quadratic, "
                "split and basic attention, and PyTorch's math kernel. Flash-like kernels store "
                "none. With Apply Gradient Checkpoint on Z-Image it also cuts q, k and v into "
                "groups of heads."
            ),
            search_aliases=["attention slicing", "sliced attention", "low vram", "split attention"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="Any model. It is not changed; the output is a patched copy."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip=(
                        "auto: slices only where the attention in use holds more than "
                        f"{BUDGET_BYTES // MIB} MiB of buffers. It takes as few slices of heads as "
                        "fit, and slices one head by its queries if that is still too much. heads: "
                        "slice_size heads at a time. queries: slice_size queries at a time. max: "
                        "one head at a time, the least memory and the slowest."
                    ),
                ),
                io.Int.Input(
                    "slices",
                    default=0,
                    min=0,
                    max=65536,
                    display_name="slice_size",
                    tooltip=(
                        "The size of a slice, as in diffusers, not the number of slices: heads "
                        "(mode heads) or queries (mode queries, rounded up to a multiple of 64). "
                        "Smaller slices save more memory and are slower. 0 = half. auto and max do "
                        "not use it."
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
