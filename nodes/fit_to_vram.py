"""Fit to VRAM: plans a run for a budget, chooses the settings of our nodes, and enforces it."""

from __future__ import annotations

from comfy_api.latest import io

from .denoiser.need import TEXT_TOKENS
from .denoiser.sizes import Request
from .fit import report
from .fit.answer import BUDGET_STEP_BYTES, budget_that_fits
from .fit.planner import what_else
from .host.base.server import NodeLog
from .host.fit import budget
from .host.fit.inputs import planner_for
from .host.fit.patch import NAME, with_plan, with_planned_vae
from .host.fit.route import UI_KEY
from .host.fit.text_encoder import with_limit
from .prefer import PREFERENCES, Prefer
from .units import GIB


class FitToVRAM(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageFitToVRAM",
            display_name="Fit to VRAM",
            category="model/patch/z-image",
            description=(
                "Predicts the memory peak of each stage of a Z-Image run before it starts, chooses "
                "the settings that fit the budget, and has ComfyUI keep the weights within it. It "
                "replaces Apply Gradient Checkpoint, Attention Slice and Lean VAE. It never makes "
                "the picture smaller: it refuses what does not fit, and says what would."
            ),
            search_aliases=["vram budget", "auto low vram", "memory planner"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Z-Image model. It is not changed; the output is a patched copy.",
                ),
                io.Float.Input(
                    "budget_gib",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=BUDGET_STEP_BYTES / GIB,
                    tooltip=(
                        "GiB (1024^3 bytes) for weights, activations and workspaces together. 0 = "
                        "what this card has free, less ComfyUI's margin. A smaller budget saves "
                        "memory and costs time, because more weights are streamed from RAM."
                    ),
                ),
                io.Combo.Input(
                    "prefer",
                    options=list(PREFERENCES),
                    default="balance",
                    tooltip=(
                        "Which settings the node may take. Of those that fit, it takes the "
                        "fastest. speed: all. balance: those of balance, and smaller ones. "
                        "smallest: only the smallest, which take the least memory and are the "
                        "slowest."
                    ),
                ),
                *(
                    io.Int.Input(
                        side,
                        default=1024,
                        min=16,
                        max=16384,
                        step=16,
                        tooltip=f"The picture's {side} in pixels. A connected latent overrides it.",
                    )
                    for side in ("width", "height")
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip=(
                        "Pictures at a time. Fewer save memory. A connected latent overrides it."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip=(
                        "Becomes Lean VAE with the settings that fit. If it is not connected, "
                        "ComfyUI's own decode is shown and not limited."
                    ),
                ),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The picture's size and the batch are read from it.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "The prompt's length is read from it. If it is not connected, 512 tokens "
                        "are assumed. A shorter prompt needs slightly less memory."
                    ),
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip=(
                        "Its text encoder keeps to the budget too. If not all weights fit, its "
                        "embedding table (0.72 GiB) stays in RAM. Connect the output to the prompt "
                        "nodes. If it is not connected, ComfyUI's own encode is shown and not "
                        "limited."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The planned model, for a sampler."),
                io.Vae.Output(tooltip="The planned VAE; empty if no VAE is connected."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The plan as a text table: peaks by stage in GiB, settings, streaming.",
                ),
                io.Clip.Output(tooltip="The planned CLIP; empty if no CLIP is connected."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        budget_gib: float = 0.0,
        prefer: Prefer = "balance",
        width: int = 1024,
        height: int = 1024,
        batch_size: int = 1,
        vae=None,
        latent=None,
        conditioning=None,
        clip=None,
    ) -> io.NodeOutput:
        asked = Request(width, height, batch_size, TEXT_TOKENS)
        planner = planner_for(
            model,
            asked,
            named_bytes=int(budget_gib * GIB),
            prefer=prefer,
            vae=vae,
            clip=clip,
            latent=latent,
            conditioning=conditioning,
        )
        device, node_id = model.load_device, cls.hidden.unique_id if cls.hidden else None
        room = budget.room_bytes(device)
        plan = planner.plan(planner.request, room)
        budget.check_ram(plan, model, None if clip is None else clip.patcher)
        others, headline = what_else(plan), report.headline(plan)
        speed, notes = budget.copy_bytes_per_s(device), budget.notes(model)
        text = report.text(plan, others=others, copy_bytes_per_s=speed, notes=notes)
        shown = report.as_json(
            plan,
            others=others,
            card_bytes=budget.card_bytes(device),
            named_bytes=planner.named_bytes,
            larger_bytes=budget_that_fits(planner, plan, room),
            copy_bytes_per_s=speed,
        )
        patched = with_plan(model, planner, node_id)
        lean = None if vae is None else with_planned_vae(vae, planner, node_id)
        text_encoder = (
            None if clip is None else with_limit(clip, planner, device, node_id, name=NAME)
        )
        NodeLog(NAME, node_id).say(headline)
        return io.NodeOutput(patched, lean, text, text_encoder, ui={UI_KEY: [shown]})
