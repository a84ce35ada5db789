"""What is known of a model: its family, its blocks and its sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import comfy.ldm.lumina.model as lumina
import comfy.model_management
import comfy.supported_models
from comfy.model_patcher import ModelPatcher

from ...denoiser.families import FamilySizes
from ...denoiser.plan import DenoiserChoice
from ...denoiser.sizes import TransformerSizes
from ...denoiser.unet_peak import UNetSizes
from ..base.device import is_dynamic
from ..base.fetch import mixes_rows
from .block import is_known_block
from .family import Family, block_names
from .flux import FLUX
from .forward import is_ming_image
from .projections import is_whole
from .qwen_image import QWEN_IMAGE
from .replaced import Replaced
from .unet import UNET, published
from .wan import WAN

FAMILIES = (FLUX, QWEN_IMAGE, WAN, UNET)
REFINERS = ("context_refiner", "noise_refiner")


def transformer_sizes(model: ModelPatcher) -> TransformerSizes:
    """The sizes of the model's transformer.

    Raises:
        ValueError: the model is not the host's NextDiT (Z-Image, Lumina 2) or of `FAMILIES`.
    """
    denoiser: Any = model.get_model_object("diffusion_model")
    family = family_of(denoiser)
    if type(denoiser) is not lumina.NextDiT and family is None:
        *names, last = (name for each in FAMILIES for name in each.names)
        raise ValueError(
            f"Apply Gradient Checkpoint works on Z-Image, Lumina 2, {', '.join(names)} and {last}, "
            f"this model is {type(model.model).__name__}: use Attention Slice, which works on "
            "most models"
        )
    # Ignore replaced blocks when reading sizes.
    found = ((name, model.get_model_object(name)) for name in names_of_blocks(denoiser))
    known: dict[str, Any] = {
        name: b for name, b in found if isinstance(b, Replaced) or is_known(denoiser, b)
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
    family = family_of(model.model.diffusion_model)
    published = None if family is None else family.published(sizes)
    return None if published is None else replace(published, sizes=sizes)


def published_unet(
    model: ModelPatcher, sizes: TransformerSizes, choice: DenoiserChoice
) -> UNetSizes | None:
    """The U-Net that predictions are made of, where they hold: see `unet_peak`.

    They were measured with automatic sizes, and with skip tensors that leave a card for RAM.
    """
    denoiser: Any = model.model.diffusion_model
    is_measured = not (choice.chunk_tokens or choice.groups) and (
        choice.prefer != "smallest" or model.load_device.type == "cuda"
    )
    return published(denoiser, sizes) if is_measured and UNET.has(denoiser) else None


def activation_bytes(model: ModelPatcher) -> int:
    """Bytes of one activation element of the model."""
    return comfy.model_management.dtype_size(model.model.get_dtype_inference())


def family_of(denoiser: Any) -> Family | None:
    """None for Z-Image and Lumina 2, and for models that are not known."""
    return next((family for family in FAMILIES if family.has(denoiser)), None)


def is_known(denoiser: Any, part: Any) -> bool:
    family = family_of(denoiser)
    return is_known_block(part) if family is None else family.is_known(part)


def names_of_blocks(denoiser: Any) -> list[str]:
    family = family_of(denoiser)
    if family is None:
        return block_names(denoiser, (*REFINERS, "layers"))
    return family.block_names(denoiser)
