"""Fit to VRAM: plans a picture for a budget, chooses the settings of our nodes, and keeps to it."""

from __future__ import annotations

import logging
from dataclasses import replace

from comfy_api.latest import io

from .denoiser.need import TEXT_TOKENS, of_latent
from .denoiser.plan import DEFAULT_GROUPS, chunk_for
from .denoiser.sizes import Request, TransformerSizes
from .fit import report as fit_report
from .fit.planner import Planner, answer, what_else
from .fit.stages import Models, published_models
from .fit.what_fits import Run
from .host.attention import patch as attention
from .host.base.server import NodeLog
from .host.denoiser import patch as lean_patch
from .host.denoiser.block import BlockSettings
from .host.fit import budget, latents
from .host.fit import patch as fit_patch
from .host.fit import route as fit_route
from .host.vae import patch as lean_vae
from .host.vae.forward import VaeSettings
from .toolboxes import BLOCK
from .vae.plan import PREFERENCES, Prefer

logger = logging.getLogger(__name__)

GIB = 2**30
LARGEST_PX, LARGEST_BATCH = 16384, 4096


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
                "the settings of Apply Gradient Checkpoint, Attention Slice and Lean VAE that fit "
                "the budget, and has ComfyUI keep the weights within it. The picture is never made "
                "smaller; what does not fit is refused, with what would."
            ),
            search_aliases=["vram budget", "auto low vram", "memory planner"],
            inputs=[
                io.Model.Input("model", tooltip="A Z-Image model; it stays as it is."),
                io.Float.Input(
                    "budget_gib",
                    default=0.0,
                    min=0.0,
                    max=1024.0,
                    step=0.25,
                    tooltip=(
                        "GiB (1024^3 bytes) that weights, activations and workspaces may take. A "
                        "smaller budget saves memory and streams more weights from RAM, which "
                        "costs time. 0 = what this card has free, less the host's margin."
                    ),
                ),
                io.Combo.Input(
                    "prefer",
                    options=list(PREFERENCES),
                    default="balance",
                    tooltip=(
                        "speed: the fastest settings that fit. balance: begins at three head "
                        "groups and Lean VAE balance. smallest: the least memory, the slowest."
                    ),
                ),
                *(
                    io.Int.Input(
                        side,
                        default=1024,
                        min=16,
                        max=LARGEST_PX,
                        step=16,
                        tooltip="Of the picture, in pixels; not used where a latent is connected.",
                    )
                    for side in ("width", "height")
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=LARGEST_BATCH,
                    tooltip=(
                        "Pictures at a time; fewer save memory. Not used where a latent is "
                        "connected."
                    ),
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Comes out as Lean VAE with what fits; else only its need is shown.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="Gives the picture's size and the batch."
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "Gives the prompt's length; without it 512 tokens are reckoned with. A "
                        "shorter prompt needs a little less."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the plan, for a sampler."),
                io.Vae.Output(tooltip="The VAE with the plan; nothing where none came in."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="The plan as a table: peaks by stage in GiB, settings, streaming.",
                ),
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
    ) -> io.NodeOutput:
        lean_patch.check_is_z_image(model)
        sizes = TransformerSizes(**lean_patch.transformer_sizes(model))
        request = Request(
            width, height, batch_size, TEXT_TOKENS, lean_patch.activation_bytes(model), sizes
        )
        if latent is not None:
            request = of_latent(request, latents.shape_of(latent, sizes.channels))
        tokens = latents.text_tokens(conditioning)
        request = replace(request, text_tokens=tokens or TEXT_TOKENS)
        vae_sizes = None if vae is None else lean_vae.sizes_of(vae)
        planner = Planner(
            _models(model, vae, sizes, vae_sizes),
            request,
            int(budget_gib * GIB),
            budget.margin_bytes(),
            prefer,
            floor_bytes=budget.floor_bytes(model),
            run=Run(has_text=conditioning is None, has_lean_vae=vae_sizes is not None),
        )
        plan = planner.plan(request, budget.room_bytes(model.load_device))
        others, headline = what_else(plan), fit_report.headline(plan)
        notes = [f"Here {budget.enforcement(model)}."]
        if attention.holds_scores():
            notes.append(
                "This host's attention keeps scores, which are not in the figures: add Attention "
                "Slice."
            )
        report = fit_report.text(
            plan,
            others=others,
            copy_bytes_per_s=budget.copy_bytes_per_s(model.load_device),
            notes=notes,
        )
        node_id = cls.hidden.unique_id if cls.hidden else None
        log = NodeLog("Fit to VRAM", node_id)
        watch = fit_patch.Watch(planner, log)
        sample = replace(request, batch=1)  # a block takes them one by one, however many there are
        settings = BlockSettings(
            kernels=BLOCK,
            chunk_tokens=lambda tokens, groups: chunk_for(sample, tokens, groups),
            groups=DEFAULT_GROUPS,
        )
        patched = lean_patch.with_lean_blocks(
            model, settings, blocks="all", prepare=watch.prepare, node_id=node_id
        )
        fit_patch.put_watch(patched, watch)
        lean = None if vae is None else _lean_vae(vae, planner, node_id)
        log.say(headline)
        shown = fit_report.as_json(plan, others=others)
        shown["card_bytes"] = budget.card_bytes(model.load_device)
        return io.NodeOutput(patched, lean, report, ui={fit_route.UI_KEY: [shown]})


def _models(model, vae, sizes: TransformerSizes, vae_sizes) -> Models:
    """The run's models: those at hand as they are, the others as they are published."""
    models = replace(
        published_models(),
        denoiser=sizes,
        denoiser_weight_bytes=budget.weight_bytes(model),
        has_ram=model.load_device.type == "cuda",
    )
    if vae_sizes is None:
        return models
    return replace(
        models,
        decoder=vae_sizes.decoder,
        encoder=vae_sizes.encoder,
        vae_dtype_bytes=vae.vae_dtype.itemsize,
        vae_weight_bytes=vae.patcher.model_size(),
    )


def _lean_vae(vae, planner: Planner, node_id: str | None):
    """The VAE in strips, with the preference chosen at each call."""
    settings = VaeSettings(
        choose=lambda call, device: planner.vae_choice(call, budget.room_bytes(device)),
        budget=planner.named_bytes or None,
    )
    lean, reason = lean_vae.with_lean_vae(vae, settings, NodeLog("Lean VAE", node_id))
    if reason is not None:
        logger.warning("Fit to VRAM: the VAE stays stock: %s", reason)
    return lean


def register_route() -> None:
    """Lets the page ask what a picture would need."""
    fit_route.add(lambda asked, room: answer(asked, room, budget.margin_bytes()))
