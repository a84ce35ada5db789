"""The host's Z-Image forward with one residual stream that every block updates in place.

A DIFFUSION_MODEL wrapper runs it. Requests that it does not know go to the host's own forward,
which then calls the lean blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.lumina.model as lumina
import torch

from ...denoiser.cuts import DenoiserPlan, chunks
from ..base.block_events import block_ended
from .block import BlockSettings, is_untouched, run_block
from .controlnet import lean_controls
from .heads import RopeFn, views_of
from .patches import Patched, Stream, patches_of
from .positions import rope_table
from .prefetch import prefetching
from .projections import projection
from .replaced import eager
from .sequence import Layout, embed, layout_of

# What a request has of its reference pictures.
OF_REFERENCES = ("ref_latents", "ref_contexts", "siglip_feats")
# A pooled text is read by models with a projection for it only, and those are not plain.
KNOWN = ("transformer_options", "clip_text_pooled", *OF_REFERENCES)


def make_wrapper(settings: BlockSettings, on_handover: Callable[[str], None]) -> Callable[..., Any]:
    """A DIFFUSION_MODEL wrapper that runs plain requests with `run_forward`.

    Args:
        on_handover: called with the reason, in a few words, when a request goes to the host's own
            forward.
    """

    def wrapper(executor, x, timesteps, context, num_tokens, attention_mask=None, **kwargs):
        model = executor.class_obj
        is_last = executor.idx + 1 == len(executor.wrappers)
        reason = "another node's wrapper comes after this one"
        if is_last:
            reason = _why_not_plain(model, x, context, kwargs)
        options = kwargs.get("transformer_options", {})
        if reason is not None:
            on_handover(reason)
            plan_of = functools.partial(settings.plan, transformer_options=options)
            with lean_controls(options, plan_of) as kwargs["transformer_options"]:
                return executor(x, timesteps, context, num_tokens, attention_mask, **kwargs)
        of_references = {name: kwargs.get(name) or () for name in OF_REFERENCES}
        return run_forward(model, x, timesteps, context, options, settings, **of_references)

    return wrapper


def is_ming_image(denoiser: Any) -> bool:
    """Whether a NextDiT is Ming-Image (hosts after 0.33.0): frames, and masked padding."""
    return hasattr(denoiser, "__ming_image__")


def _why_not_plain(
    model: Any, x: torch.Tensor, context: torch.Tensor, kwargs: Mapping[str, Any]
) -> str | None:
    """Why the request needs the host's own forward; None for a plain one."""
    if type(model) is not lumina.NextDiT or model.clip_text_pooled_proj is not None:
        return f"the model is a {type(model).__name__}"
    if x.ndim != 4 or is_ming_image(model):
        return "the model is Ming-Image"
    if torch.is_grad_enabled():
        # Patches of other nodes may bring weights of their own.
        has_grad = any(t.requires_grad for t in (x, context, *model.parameters()))
        if has_grad or patches_of(kwargs.get("transformer_options", {})):
            return "gradients are on"
    for name, value in kwargs.items():
        is_empty = value is None or (isinstance(value, list | tuple) and not value)
        if name not in KNOWN and not is_empty:
            return f"the request has {name}"
    for latent in kwargs.get("ref_latents") or ():
        is_whole = not any(side % model.patch_size for side in latent.shape[-2:])
        if latent.ndim != 4 or not is_whole or latent.dtype != x.dtype:
            return f"a reference latent is {latent.dtype}, {list(latent.shape)}"
        if model.pad_tokens_multiple is None:
            return "the model does not know reference latents"
    blocks = [*model.context_refiner, *model.noise_refiner, *model.layers]
    blocks += model.siglip_refiner or ()
    if not all(is_untouched(block) for block in blocks):
        return "another node changed a block"
    return None


@eager
def run_forward(
    model: Any,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    transformer_options: dict[str, Any],
    settings: BlockSettings,
    *,
    ref_latents: Sequence[torch.Tensor] = (),
    ref_contexts: Sequence[torch.Tensor] = (),
    siglip_feats: Sequence[torch.Tensor | None] = (),
) -> torch.Tensor:
    """What NextDiT._forward computes.

    Args:
        model: the host's NextDiT.
        x: latent, [B, 16, H, W], float.
        timesteps: [B], float.
        context: text features, [1 or B, L, text width], float.
        transformer_options: the request's.
        settings: how to cut.
        ref_latents, ref_contexts, siglip_feats: of reference pictures, see `layout_of`.

    Returns:
        [B, 16, H, W], float.
    """
    height, width = x.shape[-2:]
    patch = model.patch_size
    x = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
    layout = layout_of(model, x, context, ref_latents, ref_contexts, siglip_feats)
    if ref_latents:
        timesteps = torch.cat([timesteps * 0, timesteps], dim=0)
    t = model.t_embedder((1.0 - timesteps) * model.time_scale, dtype=x.dtype)
    plan = settings.plan_for(x.shape[0], layout.lengths, x.device, transformer_options)
    is_patched = bool(patches_of(transformer_options))
    if is_patched:  # patches get it whole
        plan = replace(plan, holds_rope=True)
    stream = Stream(embed(model, x, layout, plan))
    table = rope_table(model, x.device, layout, transformer_options)
    if plan.holds_rope:
        table = views_of(table(0, layout.tokens))
    latent = x if is_patched else None
    del x  # the padded copy
    layout = layout.without_given()
    drawn = layout.drawn

    with lean_controls(transformer_options, lambda _: plan) as options:
        _run_blocks(model, stream, layout, table, t, options, plan, latent)
    first = layout.tokens - drawn.tokens
    out = _final(model, stream.rows[:, first : first + drawn.filled], t, plan)
    del stream  # before the picture is put together
    sizes = [(drawn.rows * patch, drawn.columns * patch)] * len(out)
    picture = model.unpatchify(out, sizes, [0] * len(out), return_tensor=True)
    del out
    return -picture[:, :, :height, :width]


def _run_blocks(
    model: Any,
    stream: Stream,
    layout: Layout,
    table: RopeFn,
    t: torch.Tensor,
    transformer_options: dict[str, Any],
    plan: DenoiserPlan,
    latent: torch.Tensor | None,
) -> None:
    """Runs refiners and main layers on their part of the stream, in place.

    Args:
        latent: for the patches of other nodes; None without any.
    """
    patches, tokens = patches_of(transformer_options), layout.tokens

    def run(
        stack: str,
        first: int,
        last: int,
        adaln_input: torch.Tensor | None,
        timed: list[tuple[int, int]] | None,
        patch: Patched | None = None,
    ) -> None:
        for index, block in enumerate(getattr(model, stack)):
            if stack == "layers":
                transformer_options["block_index"] = index
            announce(block)
            part = stream.rows[:, first:last]
            run_block(
                block,
                part,
                part,
                rope=lambda start, stop: table(first + start, first + stop),
                adaln_input=adaln_input,
                timestep_zero_index=timed,
                transformer_options=transformer_options,
                plan=plan,
            )
            del part
            if patch is not None:
                patch(index)
            block_ended(transformer_options, f"{stack}.{index}")

    def patched(name: str, first: int, text_tokens: int, **more: Any) -> Patched | None:
        if name not in patches:
            return None
        given = {"pe": table(first, tokens), "vec": t, "x": latent, **more}
        given["transformer_options"] = transformer_options
        is_main = name == "double_block"
        return Patched(patches[name], stream, first, text_tokens, given, returns_text=is_main)

    of_pictures, of_all = layout.timed
    first_feature = layout.text_tokens
    first_picture = first_feature + layout.feature_tokens
    stacks = ["context_refiner", "noise_refiner", "layers"]
    if first_picture > first_feature and model.siglip_refiner is not None:
        stacks.insert(1, "siglip_refiner")
    blocks = [block for stack in stacks for block in getattr(model, stack)]
    with prefetching(blocks, stream.rows.device, transformer_options) as announce:
        run("context_refiner", 0, first_feature, None, None)
        if "siglip_refiner" in stacks:
            run("siglip_refiner", first_feature, first_picture, None, None)
        patch = patched("noise_refiner", first_picture, first_feature, block_type="noise_refiner")
        run("noise_refiner", first_picture, tokens, t, of_pictures, patch)
        # The host's forward sets these for the patches of other nodes.
        transformer_options["total_blocks"] = len(model.layers)
        transformer_options["block_type"] = "double"
        drawn = tokens - layout.drawn.tokens
        patch = None  # its copy goes before the next is made
        patch = patched("double_block", drawn, drawn)
        run("layers", 0, tokens, t, of_all, patch)


def _final(model: Any, image: torch.Tensor, t: torch.Tensor, plan: DenoiserPlan) -> torch.Tensor:
    """The final layer on the image's rows: [B, N, D] -> [B, N, 2 * 2 * 16]."""
    layer = model.final_layer
    batch, tokens, _ = image.shape
    scale = (1 + layer.adaLN_modulation(t))[-batch:]  # with references, t begins with zeros
    with ExitStack() as until:
        linear = projection(layer.linear, image, until)
        out = image.new_empty(batch, tokens, layer.linear.out_features)
        for sample in range(batch):
            for start, stop in chunks(tokens, plan.chunk_tokens):
                rows = layer.norm_final(image[sample, start:stop]).mul_(scale[sample])
                out[sample, start:stop] = linear(rows)
    return out
