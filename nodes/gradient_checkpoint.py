"""Apply Gradient Checkpoint: the denoiser in pieces while sampling, recomputed while training."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .denoiser.families import predicted_family_savings
from .denoiser.need import TEXT_TOKENS, casts_weights, predicted_savings
from .denoiser.plan import DenoiserChoice
from .denoiser.sizes import Request
from .denoiser.unet_peak import predicted_unet_savings
from .host.base.server import NodeLog
from .host.denoiser.block import BlockSettings, fill_on
from .host.denoiser.known import (
    activation_bytes,
    has_lean_forward,
    mixes_rows_of_calls,
    published_family,
    published_unet,
    transformer_sizes,
)
from .host.denoiser.patch import BLOCKS, with_lean_blocks
from .host.denoiser.reserve import reserve
from .prefer import PREFERENCES, Prefer


class ApplyGradientCheckpoint(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageGradientCheckpoint",
            display_name="Apply Gradient Checkpoint",
            category="model/patch/z-image",
            description=(
                "Lowers the activation peak of Z-Image, Lumina 2, FLUX.1, FLUX.2, Qwen-Image, Wan, "
                "SDXL and Stable Diffusion 1.5. While sampling, the blocks run in chunks of tokens "
                "and groups of attention heads. Checkpointing as in training would save nothing "
                "there, because sampling keeps no activations for a backward pass. While training, "
                "each block is checkpointed as usual; FLUX's blocks then run as ComfyUI's own."
            ),
            search_aliases=[
                "gradient checkpointing",
                "activation checkpointing",
                "low vram",
                "chunked feed forward",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "A model of one of these families. It is not changed; the output is a "
                        "patched copy. For another model the node names the families that it "
                        "supports."
                    ),
                ),
                io.Combo.Input(
                    "blocks",
                    options=BLOCKS,
                    default=BLOCKS[0],
                    tooltip=(
                        "Which blocks run in pieces (in training: are recomputed). all saves most "
                        "memory, because the forward around the blocks runs in pieces too. The "
                        "others leave that forward to ComfyUI."
                    ),
                ),
                io.Int.Input(
                    "chunk_tokens",
                    default=0,
                    min=0,
                    max=65536,
                    step=64,
                    tooltip=(
                        "Tokens at a time; a token is 16 x 16 pixels. Fewer save memory. Below "
                        "1024 they cost time on large cards. 0 = automatic, from prefer and the "
                        "picture's size."
                    ),
                ),
                io.Int.Input(
                    "head_groups",
                    default=0,
                    min=0,
                    max=128,
                    tooltip=(
                        "How many groups the attention heads are cut into; k and v exist for one "
                        "group at a time. More groups save memory and cost time. 0 = automatic, "
                        "from prefer. Attention Slice may ask for more."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "prefer",
                    options=list(PREFERENCES),
                    default="balance",
                    optional=True,  # prompts of before have none
                    tooltip=(
                        "For one picture of Z-Image. speed: half of ComfyUI's peak, with no more "
                        "kernel launches. balance: a quarter of the peak, with about three times "
                        "the launches; from 1024x1024 on the arithmetic hides them. smallest: "
                        "about a seventh of the peak, one or a few heads at a time, which is slow. "
                        "Pictures of a batch run one after the other."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the patch, for samplers and Train LoRA."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        blocks: str = "all",
        chunk_tokens: int = 0,
        head_groups: int = 0,
        prefer: Prefer = "balance",
    ) -> io.NodeOutput:
        sizes = transformer_sizes(model)
        choice = DenoiserChoice(prefer, head_groups, chunk_tokens)
        settings = BlockSettings(sizes, choice)
        request = Request(1024, 1024, 1, TEXT_TOKENS, activation_bytes(model), sizes)
        node_id = cls.hidden.unique_id if cls.hidden else None
        prepare = reserve(model, request, settings)
        mixes_rows = mixes_rows_of_calls(model)
        patched = with_lean_blocks(
            model, settings, blocks=blocks, prepare=prepare, node_id=node_id, mixes_rows=mixes_rows
        )
        fill = fill_on(model.load_device, sizes)
        family = published_family(model, sizes)
        unet = published_unet(model, sizes, choice)
        if unet is not None and blocks == "all":
            text = predicted_unet_savings(unet, choice, dtype_bytes=request.dtype_bytes, fill=fill)
        elif family is not None and blocks == "all":
            text = predicted_family_savings(
                family, choice, dtype_bytes=request.dtype_bytes, fill=fill
            )
        elif has_lean_forward(model, blocks):
            is_cast = casts_weights(request, model.model_size())
            text = predicted_savings(
                request,
                settings.choice,
                fill=fill,
                mixes_rows=mixes_rows,
                is_cast=is_cast,
            )
        else:
            text = f"{blocks}: computed in pieces under ComfyUI's own forward"
        NodeLog("Apply Gradient Checkpoint", node_id).say(text)
        return io.NodeOutput(patched)
