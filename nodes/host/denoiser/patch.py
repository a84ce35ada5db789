"""Puts the lean blocks and the lean forward on a clone of a model, and reserves what they need."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import comfy.ldm.lumina.model as lumina
import comfy.model_management
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...denoiser.families import FamilySizes
from ...denoiser.need import denoiser_reserve_bytes, of_latent
from ...denoiser.sizes import Request, TransformerSizes
from ..base.device import is_dynamic
from ..base.fetch import mixes_rows
from ..base.options import OPTIONS_KEY
from ..base.reserve import reserved
from ..base.server import NodeLog
from .block import BlockSettings, LeanBlock, is_known_block
from .controlnet import control_sizes
from .family import Family, block_names
from .flux import FLUX
from .forward import is_ming_image, make_wrapper
from .projections import is_whole
from .qwen_image import QWEN_IMAGE
from .replaced import LeanForward, OnHandover, Replaced
from .skips import WaitingRam
from .skips import make_wrapper as make_skips_wrapper
from .unet_parts import UNET
from .wan import WAN

BLOCKS = ["all", "main layers", "every second", "refiners only"]
MIXED_ROWS = (
    "nvfp4 without input scales: each chunk is rounded by a scale of its own, so pictures may "
    "differ from ComfyUI's by rounding"
)
FAMILIES = (FLUX, QWEN_IMAGE, WAN, UNET)
REFINERS = ("context_refiner", "noise_refiner")
_KEY = f"{OPTIONS_KEY}.gradient_checkpoint"


def transformer_sizes(model: ModelPatcher) -> TransformerSizes:
    """The sizes of the model's transformer.

    Raises:
        ValueError: the model is not the host's NextDiT (Z-Image, Lumina 2) or of `FAMILIES`.
    """
    denoiser: Any = model.get_model_object("diffusion_model")
    family = _family(denoiser)
    if type(denoiser) is not lumina.NextDiT and family is None:
        *names, last = (name for each in FAMILIES for name in each.names)
        raise ValueError(
            f"Apply Gradient Checkpoint works on Z-Image, Lumina 2, {', '.join(names)} and {last}, "
            f"this model is {type(model.model).__name__}: use Attention Slice, which works on "
            "every model"
        )
    # Ignore replaced blocks when reading sizes.
    found = ((name, model.get_model_object(name)) for name in _block_names(denoiser))
    known: dict[str, Any] = {
        name: b for name, b in found if isinstance(b, Replaced) or _is_known(denoiser, b)
    }
    if family is not None and known:
        return family.sizes_of(denoiser, list(known.values()))
    block = next((b for name, b in known.items() if ".layers." in name), None)
    if block is None:
        raise ValueError("another node replaced every block: place this node before that one")
    are_whole = [is_whole(b.attention.qkv) for b in known.values()]
    # By estimate the host dequantises a weight in RAM at each use, if LoRA changes it.
    has_lora = not is_dynamic(model) and any(key.startswith(tuple(known)) for key in model.patches)
    return TransformerSizes(
        dim=denoiser.dim,
        heads=denoiser.n_heads,
        kv_heads=block.attention.n_local_kv_heads,
        head_dim=block.attention.head_dim,
        ffn_dim=block.feed_forward.w1.out_features,
        layers=len(denoiser.layers),
        refiner_layers=len(denoiser.noise_refiner),
        cap_dim=denoiser.cap_embedder[1].in_features,
        patch=denoiser.patch_size,
        channels=denoiser.in_channels,
        pad_multiple=denoiser.pad_tokens_multiple or 1,
        is_whole=any(are_whole),
        is_dequantised=has_lora or not all(are_whole),
        has_features=denoiser.siglip_embedder is not None,
    )


def mixes_rows_of_calls(model: ModelPatcher) -> bool:
    """True where chunks change the rounding of the model's quantised layers."""
    denoiser: Any = model.get_model_object("diffusion_model")
    return any(mixes_rows(layer) for layer in denoiser.modules())


def check_is_z_image(model: ModelPatcher) -> None:
    """Refuses other families.

    Raises:
        ValueError: the model is not Z-Image as the host knows it.
    """
    config = getattr(model.model, "model_config", None)
    is_z_image = type(config) is comfy.supported_models.ZImage
    if not is_z_image or type(model.model.diffusion_model) is not lumina.NextDiT:
        family = type(model.model if config is None else config).__name__
        raise ValueError(
            f"Fit to VRAM plans for Z-Image, this model is {family}: Attention Slice and Lean VAE "
            "work on other families, without a plan"
        )


def has_lean_forward(model: ModelPatcher, blocks: str) -> bool:
    """Whether the forward around the blocks is lean as well, for plain requests."""
    denoiser = model.model.diffusion_model
    return blocks == "all" and type(denoiser) is lumina.NextDiT and not is_ming_image(denoiser)


def published_family(model: ModelPatcher, sizes: TransformerSizes) -> FamilySizes | None:
    """The model of another family that predictions are made of, with those sizes."""
    family = _family(model.model.diffusion_model)
    published = None if family is None else family.published(sizes)
    return None if published is None else replace(published, sizes=sizes)


def activation_bytes(model: ModelPatcher) -> int:
    """Bytes of one activation element of the model."""
    return comfy.model_management.dtype_size(model.model.get_dtype_inference())


def with_lean_blocks(
    model: ModelPatcher,
    settings: BlockSettings,
    *,
    blocks: str,
    prepare: Callable[..., Any],
    node_id: str | None,
    mixes_rows: bool,
) -> ModelPatcher:
    """Returns a clone whose chosen blocks are lean; with "all" also the forward around them.

    The model is left as it is.

    Args:
        blocks: one of `BLOCKS`.
        prepare: a PREPARE_SAMPLING wrapper that reserves the memory; used with "all" only.
        node_id: the node that shows why a request went to the host's own forward.
        mixes_rows: chunks change the rounding, see `mixes_rows_of_calls`.
    """
    log = NodeLog("Apply Gradient Checkpoint", node_id)

    def on_handover(reason: str) -> None:
        log.say_once(reason, f"{reason}: only the blocks are lean, not the forward around them")

    if mixes_rows:
        log.say_once("nvfp4", MIXED_ROWS)

    def on_stock_block(reason: str) -> None:
        log.say_once(reason, f"{reason}: ComfyUI's own code runs there")

    def on_held_skips(reason: str) -> None:
        log.say_once(reason, f"{reason}: all skip tensors wait, as ComfyUI's own")

    clone = model.clone()
    _put_blocks(clone, settings, blocks, on_stock_block)
    kinds = (WrappersMP.DIFFUSION_MODEL, WrappersMP.PREPARE_SAMPLING, WrappersMP.OUTER_SAMPLE)
    for kind in kinds:
        clone.remove_wrappers_with_key(kind, _KEY)
    if blocks == "all" and type(model.model.diffusion_model) is lumina.NextDiT:
        wrapper = make_wrapper(settings, on_handover)
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, _KEY, wrapper)
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, prepare)
    if blocks == "all" and UNET.has(model.model.diffusion_model):
        ram = WaitingRam(log) if settings.choice.prefer == "smallest" else None
        wrapper = make_skips_wrapper(on_held_skips, ram)
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
    family, names = _family(denoiser), _block_names(denoiser)
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
            if not _is_known(denoiser, block):
                if name not in blocks_of:
                    on_handover(f"{name} is not the host's own")
                    continue
                raise ValueError(
                    f"{name} must be the host's own block, got {type(block).__name__}: place "
                    "this node before the one that replaces it"
                )
            if family is None:
                lean: Replaced = LeanBlock(block, settings)
            else:
                lean = family.lean(denoiser, name, block, settings, on_handover)
            patcher.add_object_patch(name, lean)
    if family is not None:
        _put_forwards(patcher, family, settings, blocks, on_handover)


def _put_forwards(
    patcher: ModelPatcher,
    family: Family,
    settings: BlockSettings,
    blocks: str,
    on_handover: OnHandover,
) -> None:
    model = weakref.ref(patcher.model)  # which would hold itself

    def dtype_of() -> torch.dtype | None:
        found = model()
        return None if found is None else found.get_dtype_inference()

    for name, make in family.forwards.items():
        path = f"diffusion_model.{name}"
        put = patcher.object_patches.get(f"{path}.forward")
        if isinstance(put, LeanForward):  # of this node before, or of the model that was copied
            del patcher.object_patches[f"{path}.forward"]
        if blocks != "all":
            continue
        layer = patcher.get_model_object(path)
        forward = patcher.get_model_object(f"{path}.forward")
        if getattr(forward, "__func__", None) is type(layer).forward:
            made = make(layer, settings, on_handover, dtype_of)
            patcher.add_object_patch(f"{path}.forward", made)
        else:
            on_handover(f"another node changed {name}")


def _family(denoiser: Any) -> Family | None:
    """None for Z-Image and Lumina 2, and for models that are not known."""
    return next((family for family in FAMILIES if family.has(denoiser)), None)


def _is_known(denoiser: Any, part: Any) -> bool:
    family = _family(denoiser)
    return is_known_block(part) if family is None else family.is_known(part)


def _block_names(denoiser: Any) -> list[str]:
    family = _family(denoiser)
    if family is None:
        return block_names(denoiser, (*REFINERS, "layers"))
    return family.block_names(denoiser)


def _is_chosen(name: str, blocks: str) -> bool:
    _, stack, *number = name.split(".")
    if stack in REFINERS:
        return blocks in ("all", "refiners only")
    return blocks in ("all", "main layers") or (
        blocks == "every second" and int(number[0]) % 2 == 0
    )


def reserve_need(request: Request, settings: BlockSettings) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper: ComfyUI plans with our need instead of its own estimate."""

    def prepare(executor, model, noise_shape, *args, **kwargs):
        if len(noise_shape) != 4:  # frames: the host's own estimate counts them
            return executor(model, noise_shape, *args, **kwargs)
        estimate = model.model.memory_required(list(noise_shape))
        options = (kwargs.get("model_options") or {}).get("transformer_options", {})
        latent = replace(of_latent(request, noise_shape), controls=control_sizes(options))
        plan = settings.plan_for(latent.batch, latent.lengths, model.load_device)
        need = denoiser_reserve_bytes(latent, plan)
        with reserved(model, estimate, need):
            return executor(model, noise_shape, *args, **kwargs)

    return prepare
