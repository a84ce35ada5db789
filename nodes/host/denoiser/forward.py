"""The host's Z-Image forward with one residual stream that every block updates in place.

A DIFFUSION_MODEL wrapper runs it for plain requests. All others go to the host's own forward, which
then calls the lean blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import comfy.ldm.common_dit
import comfy.ldm.lumina.model as lumina
import comfy.utils
import torch
from comfy.ldm.flux.math import rope

from ...denoiser.cuts import DenoiserPlan, chunks
from ..base.block_events import block_ended
from .block import BlockSettings, eager, is_untouched, run_block
from .heads import RopeFn, views_of
from .projections import projection

# Patches that only the host's own forward calls.
HANDOVER_PATCHES = ("double_block", "noise_refiner")


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
        if reason is not None:
            on_handover(reason)
            return executor(x, timesteps, context, num_tokens, attention_mask, **kwargs)
        options = kwargs.get("transformer_options", {})
        return run_forward(model, x, timesteps, context, options, settings)

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
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, context, *model.parameters())):
        return "gradients are on"
    options = kwargs.get("transformer_options", {})
    patches = options.get("patches", {})
    for name in HANDOVER_PATCHES:
        if patches.get(name):
            return f"a {name} patch is installed"
    for name, value in kwargs.items():
        is_empty = value is None or (isinstance(value, list | tuple) and not value)
        # clip_text_pooled is read by models with a pooled projection only, and those are not plain.
        if name not in ("transformer_options", "clip_text_pooled") and not is_empty:
            return f"the request has {name}"
    blocks = (*model.context_refiner, *model.noise_refiner, *model.layers)
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
) -> torch.Tensor:
    """What NextDiT._forward computes for a plain request.

    Args:
        model: the host's NextDiT.
        x: latent, [B, 16, H, W], float.
        timesteps: [B], float.
        context: text features, [1 or B, L, text width], float.
        transformer_options: the request's.
        settings: how to cut.

    Returns:
        [B, 16, H, W], float.
    """
    height, width = x.shape[-2:]
    patch = model.patch_size
    x = comfy.ldm.common_dit.pad_to_patch_size(x, (patch, patch))
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    t = model.t_embedder((1.0 - timesteps) * model.time_scale, dtype=x.dtype)
    text_tokens = _padded(context.shape[1], model)
    image_tokens = _padded(rows * columns, model)
    tokens = text_tokens + image_tokens
    lengths = tokens, image_tokens, text_tokens
    plan = settings.plan_for(x.shape[0], lengths, x.device, transformer_options)
    stream = _embed(model, x, context, tokens, plan)
    table = _rope_table(model, x.device, tokens, text_tokens, rows, columns, transformer_options)
    if plan.holds_rope:
        table = views_of(table(0, tokens))
    del x  # the padded copy

    _run_blocks(model, stream, text_tokens, table, t, transformer_options, plan)
    image_tokens = rows * columns
    out = _final(model, stream[:, text_tokens : text_tokens + image_tokens], t, plan)
    del stream  # before the picture is put together
    sizes = [(rows * patch, columns * patch)] * len(out)
    picture = model.unpatchify(out, sizes, [0] * len(out), return_tensor=True)
    del out
    return -picture[:, :, :height, :width]


def _run_blocks(
    model: Any,
    stream: torch.Tensor,
    text_tokens: int,
    table: RopeFn,
    t: torch.Tensor,
    transformer_options: dict[str, Any],
    plan: DenoiserPlan,
) -> None:
    """Runs text refiners, image refiners and main layers on their part of the stream, in place."""

    def run(stack: str, first: int, last: int, adaln_input: torch.Tensor | None) -> None:
        part = stream[:, first:last]
        for index, block in enumerate(getattr(model, stack)):
            if stack == "layers":
                transformer_options["block_index"] = index
            run_block(
                block,
                part,
                part,
                rope=lambda start, stop: table(first + start, first + stop),
                adaln_input=adaln_input,
                transformer_options=transformer_options,
                plan=plan,
            )
            block_ended(transformer_options, f"{stack}.{index}")

    tokens = stream.shape[1]
    run("context_refiner", 0, text_tokens, None)
    run("noise_refiner", text_tokens, tokens, t)
    # The host's forward sets these for the patches of other nodes.
    transformer_options["total_blocks"] = len(model.layers)
    transformer_options["block_type"] = "double"
    run("layers", 0, tokens, t)


def _padded(tokens: int, model: Any) -> int:
    multiple = model.pad_tokens_multiple
    return tokens if multiple is None else tokens + (-tokens) % multiple


def _embed(
    model: Any, x: torch.Tensor, context: torch.Tensor, tokens: int, plan: DenoiserPlan
) -> torch.Tensor:
    """Text and image tokens in one buffer, [B, T, D]."""
    batch, channels, height, width = x.shape
    patch = model.patch_size
    text = comfy.utils.repeat_to_batch_size(model.cap_embedder(context), batch)
    text_tokens = _padded(text.shape[1], model)
    image_tokens = height // patch * (width // patch)
    stream = x.new_empty(batch, tokens, model.dim)
    stream[:, : text.shape[1]] = text
    if text_tokens > text.shape[1]:
        stream[:, text.shape[1] : text_tokens] = model.cap_pad_token.to(stream)
    if tokens > text_tokens + image_tokens:
        stream[:, text_tokens + image_tokens :] = model.x_pad_token.to(stream)
    del text
    # [B, C, H, W] -> [B, H / 2 * W / 2, 2 * 2 * C]
    patches = x.view(batch, channels, height // patch, patch, width // patch, patch)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    with ExitStack() as until:
        embed = projection(model.x_embedder, patches, until)
        image = stream[:, text_tokens:]
        for sample in range(batch):
            for start, stop in chunks(image_tokens, plan.chunk_tokens):
                image[sample, start:stop] = embed(patches[sample, start:stop])
    return stream


def _rope_table(
    model: Any,
    device: torch.device,
    tokens: int,
    text_tokens: int,
    rows: int,
    columns: int,
    transformer_options: dict[str, Any],
) -> RopeFn:
    """The rotary table of a run of tokens, gathered from one table per axis.

    The positions of an image are a grid, so each axis has few distinct ones. The tables are cut
    into units of one length, so that one gather makes all of a token's row.

    Memory: per axis its positions * axis_dim * 8 bytes; per token an index of 4 bytes a unit.
    Exact: bit-exact, the host's own function makes the tables.
    """
    grid = lumina.pos_ids_x(text_tokens + 1, rows, columns, 1, device, transformer_options)[0]
    zero = grid.new_zeros(1)
    text = torch.arange(text_tokens, dtype=torch.float32, device=device) + 1.0
    positions = (
        torch.cat([zero, text, grid[:1, 0]]),
        torch.cat([zero, grid[::columns, 1]]),
        torch.cat([zero, grid[:columns, 2]]),
    )
    embedder = model.rope_embedder
    pairs = [dim // 2 for dim in embedder.axes_dim]
    unit = math.gcd(*pairs)
    # [P, dim / 2, 2, 2] per axis -> [P * units, unit * 4]
    tables = torch.cat(
        [
            rope(position[None], dim, embedder.theta)[0].reshape(-1, unit * 4)
            for position, dim in zip(positions, embedder.axes_dim, strict=True)
        ]
    )
    # Index 0 is position zero: text has it on the two picture axes, padding on all three.
    index = torch.zeros(3, tokens, dtype=torch.int32, device=device)
    index[0, :text_tokens] = torch.arange(1, text_tokens + 1, device=device)
    image = index[:, text_tokens : text_tokens + rows * columns]
    image[0] = text_tokens + 1
    image[1] = torch.arange(1, rows + 1, device=device).repeat_interleave(columns)
    image[2] = torch.arange(1, columns + 1, device=device).repeat(rows)
    begin, of_axes = 0, []
    for axis, (position, count) in enumerate(zip(positions, pairs, strict=True)):
        units = count // unit
        of_unit = torch.arange(units, dtype=torch.int32, device=device) + begin
        of_axes.append(index[axis, :, None] * units + of_unit)
        begin += len(position) * units
    units = torch.cat(of_axes, dim=1)  # [T, units of a token]

    def gather(start: int, stop: int) -> torch.Tensor:
        rows = tables.index_select(0, units[start:stop].flatten())
        return rows.view(1, stop - start, 1, -1, 2, 2)

    return gather


def _final(model: Any, image: torch.Tensor, t: torch.Tensor, plan: DenoiserPlan) -> torch.Tensor:
    """The final layer on the image's rows: [B, N, D] -> [B, N, 2 * 2 * 16]."""
    layer = model.final_layer
    scale = 1 + layer.adaLN_modulation(t)
    batch, tokens, _ = image.shape
    with ExitStack() as until:
        linear = projection(layer.linear, image, until)
        out = image.new_empty(batch, tokens, layer.linear.out_features)
        for sample in range(batch):
            for start, stop in chunks(tokens, plan.chunk_tokens):
                rows = layer.norm_final(image[sample, start:stop]).mul_(scale[sample])
                out[sample, start:stop] = linear(rows)
    return out
