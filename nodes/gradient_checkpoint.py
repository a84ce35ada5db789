"""Apply Gradient Checkpoint: the denoiser in pieces while sampling, recomputed while training."""

from __future__ import annotations

import logging
from dataclasses import replace

from comfy_api.latest import io

from .denoiser.need import TEXT_TOKENS, denoiser_need_bytes, of_latent
from .denoiser.plan import (
    DEFAULT_GROUPS,
    chunk_for,
    denoiser_plan,
    lean_peak_bytes,
    stock_peak_bytes,
)
from .denoiser.sizes import Request, TransformerSizes
from .host.base import server
from .host.denoiser import patch as lean_patch
from .host.denoiser.block import BlockSettings
from .toolboxes import BLOCK

logger = logging.getLogger(__name__)

MIB = 2**20


class ApplyGradientCheckpoint(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageGradientCheckpoint",
            display_name="Apply Gradient Checkpoint",
            category="model/patch/z-image",
            description=(
                "Lowers the activation peak of Z-Image and Lumina 2. While sampling, the blocks "
                "run in chunks of tokens and groups of heads into one buffer: checkpointing as in "
                "training would save nothing there, as no activation is kept for a backward pass. "
                "While training, it is real checkpointing, block by block."
            ),
            search_aliases=[
                "gradient checkpointing",
                "activation checkpointing",
                "low vram",
                "chunked feed forward",
            ],
            inputs=[
                io.Model.Input("model", tooltip="A Z-Image or Lumina 2 model; it stays as it is."),
                io.Combo.Input(
                    "blocks",
                    options=lean_patch.BLOCKS,
                    default=lean_patch.BLOCKS[0],
                    tooltip=(
                        "Which blocks are computed in pieces (training: recomputed). all saves "
                        "most, and also runs the forward around the blocks in one buffer; the "
                        "others keep the host's own forward."
                    ),
                ),
                io.Int.Input(
                    "chunk_tokens",
                    default=0,
                    min=0,
                    max=65536,
                    step=64,
                    tooltip=(
                        "Tokens at a time; a token is 16 x 16 pixels. Fewer save memory and cost "
                        "time below 512. 0 = automatic, from the picture's size."
                    ),
                ),
                io.Int.Input(
                    "head_groups",
                    default=0,
                    min=0,
                    max=128,
                    tooltip=(
                        "Into how many groups the attention heads are cut; k and v of one group "
                        "exist at a time. More save memory and cost time. 0 = automatic (2); "
                        "Attention Slice may ask for more."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the patch, for samplers and Train LoRA."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, blocks: str = "all", chunk_tokens: int = 0, head_groups: int = 0
    ) -> io.NodeOutput:
        sizes = TransformerSizes(**lean_patch.transformer_sizes(model))
        groups = head_groups or DEFAULT_GROUPS
        request = Request(1024, 1024, 1, TEXT_TOKENS, lean_patch.activation_bytes(model), sizes)
        settings = BlockSettings(
            kernels=BLOCK,
            chunk_tokens=lambda tokens, groups: chunk_for(request, tokens, groups, chunk_tokens),
            groups=groups,
        )
        node_id = cls.hidden.unique_id if cls.hidden else None
        patched = lean_patch.with_lean_blocks(
            model,
            settings,
            blocks=blocks,
            prepare=lean_patch.tell_need(
                lambda shape: denoiser_need_bytes(of_latent(request, shape), groups, chunk_tokens)
            ),
            node_id=node_id,
        )
        text = _report(request, blocks, groups, chunk_tokens)
        logger.info("Apply Gradient Checkpoint: %s", text)
        server.show_text(node_id, text)
        return io.NodeOutput(patched)


def _report(request: Request, blocks: str, groups: int, chunk_tokens: int) -> str:
    """What the node did, in one line per size."""
    if blocks != "all":
        return f"{blocks}: computed in pieces under the host's own forward"
    parts = []
    for side in (1024, 2048):
        shape = replace(request, width_px=side, height_px=side)
        plan = denoiser_plan(shape, groups=groups, chunk_tokens=chunk_tokens)
        stock, lean = (
            round(value / MIB) for value in (stock_peak_bytes(shape), lean_peak_bytes(shape, plan))
        )
        parts.append(f"{stock} -> {lean} MiB predicted at {side}x{side}")
    return f"activations {' · '.join(parts)}, exact"
