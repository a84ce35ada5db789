"""Puts the lean blocks and the lean forward on a clone of a model, and reserves what they need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ldm.lumina.model as lumina
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..base.options import OPTIONS_KEY
from ..base.server import NodeLog
from .block import BlockSettings, LeanBlock
from .controls import make_wrapper as make_controls_wrapper
from .forward import make_wrapper
from .forwards import LayersOfCall
from .known import REFINERS, family_of, is_known, names_of_blocks
from .replaced import OnHandover, Replaced
from .skips import WaitingRam
from .skips import make_wrapper as make_skips_wrapper
from .unet import UNET

BLOCKS = ["all", "main layers", "every second", "refiners only"]
MIXED_ROWS = (
    "nvfp4 without input scales: each chunk has its own scale, so pictures may differ slightly "
    "from ComfyUI's"
)
CONTROLS = "a ControlNet runs unchanged, not in pieces: its peak is not lowered"
WHOLE = (
    "layers of another node, such as those of GGUF files, compute all their columns at once: less "
    "memory is saved"
)
_KEY = f"{OPTIONS_KEY}.gradient_checkpoint"


def with_lean_blocks(
    model: ModelPatcher,
    settings: BlockSettings,
    *,
    blocks: str,
    prepare: Callable[..., Any] | None,
    node_id: str | None,
    mixes_rows: bool,
) -> ModelPatcher:
    """Returns a clone whose chosen blocks are lean; with "all" also the forward around them.

    The model is left as it is.

    Args:
        blocks: one of `BLOCKS`.
        prepare: a PREPARE_SAMPLING wrapper that reserves the memory, if any; used with "all" only.
        node_id: the node that shows why a request went to the host's own forward.
        mixes_rows: chunks change the rounding, see `mixes_rows_of_calls`.
    """
    log = NodeLog("Apply Gradient Checkpoint", node_id)

    def on_handover(reason: str) -> None:
        log.say_once(
            reason, f"{reason}: only the blocks run in pieces, not the forward around them"
        )

    if mixes_rows:
        log.say_once("nvfp4", MIXED_ROWS)
    if settings.sizes.is_whole and (settings.sizes.is_parallel or settings.sizes.makes_streams):
        log.say_once("whole", WHOLE)

    def on_stock_block(reason: str) -> None:
        log.say_once(reason, f"{reason}: ComfyUI's own code runs there")

    def on_held_skip(reason: str) -> None:
        log.say_once(reason, f"{reason}: the first skip tensor stays on the card, as in ComfyUI")

    def on_control() -> None:
        log.say_once("control", CONTROLS)

    family = family_of(model.model.diffusion_model)
    clone = model.clone()
    _put_blocks(clone, settings, blocks, on_stock_block)
    family = family_of(model.model.diffusion_model)
    for reason in () if family is None else family.left_out(model.model.diffusion_model):
        on_stock_block(reason)
    kinds = (WrappersMP.DIFFUSION_MODEL, WrappersMP.PREPARE_SAMPLING, WrappersMP.OUTER_SAMPLE)
    for kind in kinds:
        clone.remove_wrappers_with_key(kind, _KEY)
    if blocks == "all" and type(model.model.diffusion_model) is lumina.NextDiT:
        wrapper = make_wrapper(settings, on_handover)
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, wrapper)
    if blocks == "all" and prepare is not None:
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, prepare)
    if family is not None:
        clone.add_wrapper_with_key(
            WrappersMP.PREPARE_SAMPLING, _KEY, make_controls_wrapper(on_control)
        )
    if family is not None and family.forwards and blocks == "all":
        wrapper = LayersOfCall(family.forwards, settings, on_stock_block)
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, wrapper)
    if family is UNET and blocks == "all":
        ram = WaitingRam(log) if settings.choice.prefer == "smallest" else None
        wrapper = make_skips_wrapper(on_held_skip, ram)
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, wrapper)
        if ram is not None:
            clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, ram.of_sampling)

    def on_copy(source: ModelPatcher, copy: ModelPatcher) -> None:
        # A copy with weights of its own (another GPU) needs lean blocks around those.
        if copy.model is not source.model:
            _put_blocks(copy, settings, blocks, on_stock_block)

    for event in ("ON_CLONE", "ON_DEEPCLONE_MULTIGPU"):
        if hasattr(CallbacksMP, event):
            clone.remove_callbacks_with_key(getattr(CallbacksMP, event), _KEY)
            clone.add_callback_with_key(getattr(CallbacksMP, event), _KEY, on_copy)
    return clone


def _put_blocks(
    patcher: ModelPatcher, settings: BlockSettings, blocks: str, on_handover: OnHandover
) -> None:
    denoiser = patcher.model.diffusion_model
    family, names = family_of(denoiser), names_of_blocks(denoiser)
    if family is not None and blocks == "every second":
        chosen = set(family.every_second(denoiser))
    else:
        chosen = {name for name in names if _is_chosen(name, blocks)}
    if not chosen:
        raise ValueError(f"blocks must be one that this model has, got {blocks}: choose all")
    blocks_of = tuple(names)
    if family is not None:
        around = family.around_names(denoiser)
        names += around
        chosen.update(around if blocks == "all" else ())
    for name in names:
        put = patcher.object_patches.get(name)
        if isinstance(put, Replaced):  # of this node before, or of the model that was copied
            del patcher.object_patches[name]
        # Not the model's own attribute: another clone in use may have patched it.
        block = patcher.get_model_object(name)
        if name in chosen and name not in patcher.object_patches:
            if not is_known(denoiser, block):
                if name not in blocks_of:
                    on_handover(f"{name} is not ComfyUI's own")
                    continue
                raise ValueError(
                    f"{name} must be ComfyUI's own block, got {type(block).__name__}: place "
                    "this node before the one that replaces it"
                )
            if family is None:
                lean: Replaced = LeanBlock(block, settings)
            else:
                lean = family.lean(denoiser, name, block, settings, on_handover)
            patcher.add_object_patch(name, lean)


def _is_chosen(name: str, blocks: str) -> bool:
    _, stack, *number = name.split(".")
    if stack in REFINERS:
        return blocks in ("all", "refiners only")
    return blocks in ("all", "main layers") or (
        blocks == "every second" and int(number[0]) % 2 == 0
    )
