"""Loads checked weights through the host's own loaders, so that its caches, LoRA and offload apply.

The host has no loader for shards; their tensors go to the functions behind the host's loaders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.z_image import ZImageTEModel
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

from ...weights import stored
from ...weights.text_encoder import key_prefix
from .choices import Sources

WEIGHT_DTYPES = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]

StateDict = dict[str, torch.Tensor]
# Gives the state dict of a folder; called again when the host wants a second copy of the model.
StateDictSource = Callable[[], StateDict]


def steps(sources: Sources, weight_dtype: str) -> tuple[Callable[[], Any], ...]:
    """Functions that load the MODEL, the CLIP and the VAE, in this order."""
    return (
        functools.partial(_load_model, sources, weight_dtype),
        functools.partial(_load_clip, sources),
        functools.partial(load_vae, sources.vae.files),
    )


def _load_model(sources: Sources, weight_dtype: str) -> ModelPatcher:
    component, found = sources.transformer, sources.z_image
    if component.is_file:
        return load_model_file(component.files[0], weight_dtype=weight_dtype)
    targets = diffusers_targets(layers=found.layers, dim=found.dim) if found.is_diffusers else {}
    tensors = functools.partial(stored.state_dict, component, targets)
    return load_model_shards(component.files, tensors, weight_dtype=weight_dtype)


def _load_clip(sources: Sources) -> comfy.sd.CLIP:
    component, config = sources.text_encoder, sources.text_config
    prefix = key_prefix(component.tensors) or ""
    # The host's loader of files knows Qwen3 by this prefix only.
    if component.is_file and prefix == "model.":
        return load_clip_file(component.files[0], config)
    tensors = functools.partial(stored.state_dict, component)
    return load_clip_shards(component.files, tensors, config, prefix=prefix)


def diffusers_targets(*, layers: int, dim: int) -> Mapping[str, Any]:
    """The host's table from diffusers' tensor names to its own, as name or (name, slice)."""
    return comfy.utils.z_image_to_diffusers({"n_layers": layers, "dim": dim})


def load_model_file(path: Path, *, weight_dtype: str) -> ModelPatcher:
    """Loads a single file, as the host's Load Diffusion Model node does."""
    return comfy.sd.load_diffusion_model(str(path), model_options=_dtype_options(weight_dtype))


def load_model_shards(
    files: Sequence[Path], stored: StateDictSource, *, weight_dtype: str
) -> ModelPatcher:
    """Loads a transformer from shards.

    Args:
        files: the shards.
        stored: their tensors under the host's names, read from disk when they are copied.
        weight_dtype: one of `WEIGHT_DTYPES`.

    Memory: the model plus one tensor; with dynamic VRAM the host maps the shards, fuses q, k and v
        itself and keeps the mapping as the model's weights.
    """

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        state_dict = _mapped(files) if _is_dynamic(disable_dynamic) else stored()
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict,
            model_options=_dtype_options(weight_dtype),
            metadata={},
            disable_dynamic=disable_dynamic,
        )
        if patcher is None:
            raise RuntimeError("this host does not know Z-Image: update ComfyUI")
        return patcher

    patcher = load()
    patcher.cached_patcher_init = (load, ())
    return patcher


def load_clip_file(path: Path, config: Mapping[str, Any]) -> comfy.sd.CLIP:
    """Loads a text encoder from a single file, as the host's Load CLIP node does.

    Args:
        path: the file.
        config: its sizes, by the names of transformers' Qwen3Config.
    """
    clip = comfy.sd.load_clip(
        ckpt_paths=[str(path)],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.LUMINA2,
        model_options=_clip_options(config),
    )
    return _checked(clip)


def load_clip_shards(
    files: Sequence[Path], stored: StateDictSource, config: Mapping[str, Any], *, prefix: str
) -> comfy.sd.CLIP:
    """Loads a text encoder from shards.

    Args:
        files: the shards.
        stored: their tensors, read from disk when they are copied.
        config: its sizes, by the names of transformers' Qwen3Config.
        prefix: the text before ``layers.0.`` in the tensor names; the host wants ``model.``.

    Memory: as `load_model_shards`.
    """

    def load(disable_dynamic: bool = False) -> comfy.sd.CLIP:
        state_dict = _mapped(files) if _is_dynamic(disable_dynamic) else stored()
        if prefix != "model.":
            state_dict = comfy.utils.state_dict_prefix_replace(state_dict, {prefix: "model."})
        return comfy.sd.load_text_encoder_state_dicts(
            [state_dict],
            embedding_directory=folder_paths.get_folder_paths("embeddings"),
            clip_type=comfy.sd.CLIPType.LUMINA2,
            model_options=_clip_options(config),
            disable_dynamic=disable_dynamic,
        )

    def load_patcher(disable_dynamic: bool = False) -> ModelPatcher:
        return load(disable_dynamic).patcher

    clip = _checked(load())
    clip.patcher.cached_patcher_init = (load_patcher, ())
    return clip


def load_vae(files: Sequence[Path]) -> comfy.sd.VAE:
    """Loads a VAE, as the host's Load VAE node does."""
    if len(files) == 1:
        state_dict, metadata = comfy.utils.load_torch_file(str(files[0]), return_metadata=True)
    else:
        state_dict, metadata = _mapped(files), None
    vae = comfy.sd.VAE(sd=state_dict, metadata=metadata)
    vae.throw_exception_if_invalid()
    reload = getattr(comfy.sd, "load_vae_patcher", None)  # missing in hosts before 0.24
    if reload is not None and len(files) == 1:
        vae.patcher.cached_patcher_init = (reload, (str(files[0]), metadata, None))
    return vae


def dtype_name(model: ModelPatcher) -> str:
    """The dtype in which the model's weights are kept, such as "bfloat16"."""
    return str(model.model_dtype()).removeprefix("torch.")


def with_shift(model: ModelPatcher, shift: float) -> ModelPatcher:
    """A clone that samples with that timestep shift; the model itself where it does so already."""
    if model.get_model_object("model_sampling").shift == shift:
        return model
    return ModelSamplingAuraFlow().patch_aura(model, shift)[0]


def _is_dynamic(disable_dynamic: bool) -> bool:
    # The host then keeps the tensors it is given as the weights and streams them from their files.
    return comfy.memory_management.aimdo_enabled and not disable_dynamic


def _mapped(files: Sequence[Path]) -> StateDict:
    merged: StateDict = {}
    for file in files:
        merged.update(comfy.utils.load_torch_file(str(file), safe_load=True))
    return merged


def _dtype_options(weight_dtype: str) -> dict[str, Any]:
    if weight_dtype == "default":
        return {}
    options: dict[str, Any] = {"dtype": getattr(torch, f"float8_{weight_dtype.split('_')[1]}")}
    if weight_dtype.endswith("_fast"):
        options["fp8_optimizations"] = True
    return options


def _clip_options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"qwen3_4b_model_config": dict(config)}


def _checked(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    model = clip.cond_stage_model
    if not isinstance(model, ZImageTEModel):
        raise ValueError(
            f"the text encoder must be a Qwen3-4B, the host took it for {type(model).__name__}: "
            "choose qwen_3_4b.safetensors"
        )
    return clip
