"""Loads checked weights through the host's own loaders, so that its caches, LoRA and offload apply.

The host has no loader for shards; their tensors go to the functions behind the host's loaders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.text_encoders.z_image import ZImageTEModel
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

from ...weights import quantised, stored
from ...weights.component import Component
from ...weights.text_encoder import key_prefix
from .choices import Sources

WEIGHT_DTYPES = ["default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2"]


def load_all(sources: Sources, weight_dtype: str) -> list[Any]:
    """Loads the MODEL, the CLIP and the VAE; ends between two of them when the user cancels.

    Single files go through the host's own loaders, but for those of which one drops the scales or
    does not know the names.

    Memory: of a folder, the model plus one tensor. With dynamic VRAM, and where layers are
        quantised, the host maps the shards, fuses q, k and v itself and keeps the mapping as the
        model's weights.
    """
    steps = (
        lambda: _load_model(sources, weight_dtype),
        lambda: _load_clip(sources),
        lambda: load_vae(sources.vae),
    )
    bar, loaded = comfy.utils.ProgressBar(len(steps)), []
    for step in steps:
        comfy.model_management.throw_exception_if_processing_interrupted()
        loaded.append(step())
        bar.update(1)
    return loaded


def _load_model(sources: Sources, weight_dtype: str) -> ModelPatcher:
    component, found = sources.transformer, sources.z_image
    is_quantised = bool(quantised.quantised_layers(component, found.prefix))
    # 0.16.3 converts old marks after it took the prefix away, and misses two; 0.30.0 also before.
    if component.is_file and not (is_quantised and found.prefix):
        path = str(component.files[0])
        return comfy.sd.load_diffusion_model(path, model_options=_dtype_options(weight_dtype))
    targets: Mapping[str, Any] = {}
    if found.is_diffusers:
        targets = comfy.utils.z_image_to_diffusers({"n_layers": found.layers, "dim": found.dim})

    def load(disable_dynamic: bool = False) -> ModelPatcher:
        state_dict, metadata = _state_dict(component, targets, is_quantised, disable_dynamic)
        patcher = comfy.sd.load_diffusion_model_state_dict(
            state_dict,
            model_options=_dtype_options(weight_dtype),
            metadata=metadata,
            disable_dynamic=disable_dynamic,
        )
        if patcher is None:
            raise RuntimeError("this ComfyUI does not know Z-Image: update it")
        return patcher

    patcher = load()
    patcher.cached_patcher_init = (load, ())  # for when the host wants a second copy
    return patcher


def _load_clip(sources: Sources) -> comfy.sd.CLIP:
    component, prefix = sources.text_encoder, key_prefix(sources.text_encoder.tensors)
    # The host's loader of files knows Qwen3 by this prefix only.
    if component.is_file and prefix == "model.":
        path = str(component.files[0])
        return _checked(comfy.sd.load_clip(ckpt_paths=[path], **_clip_options(sources)))

    is_quantised = bool(quantised.quantised_layers(component))

    def load(disable_dynamic: bool = False) -> comfy.sd.CLIP:
        state_dict, _ = _state_dict(component, {}, is_quantised, disable_dynamic)
        if prefix != "model.":
            state_dict = comfy.utils.state_dict_prefix_replace(state_dict, {prefix: "model."})
        return comfy.sd.load_text_encoder_state_dicts(
            [state_dict], disable_dynamic=disable_dynamic, **_clip_options(sources)
        )

    def load_patcher(disable_dynamic: bool = False) -> ModelPatcher:
        return load(disable_dynamic).patcher

    clip = _checked(load())
    clip.patcher.cached_patcher_init = (load_patcher, ())
    return clip


def load_vae(component: Component) -> comfy.sd.VAE:
    """Loads a VAE, as the host's Load VAE node does."""
    files = component.files
    if len(files) == 1:
        state_dict, metadata = comfy.utils.load_torch_file(str(files[0]), return_metadata=True)
    else:
        state_dict, metadata = _loaded(component), None
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


def _state_dict(
    component: Component, targets: Mapping[str, Any], is_quantised: bool, disable_dynamic: bool
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, with the host's marks of today for old ones, and the metadata."""
    # With dynamic VRAM the host keeps these tensors as the weights and streams them from the files;
    # those of a quantised layer it always keeps.
    is_streamed = comfy.memory_management.aimdo_enabled and not disable_dynamic
    if is_streamed or is_quantised:
        tensors = _loaded(component)
    else:
        tensors = stored.state_dict(component, targets)
    metadata = quantised.joined_metadata(component)
    return comfy.utils.convert_old_quants(tensors, metadata=metadata)


def _loaded(component: Component) -> dict[str, torch.Tensor]:
    merged: dict[str, torch.Tensor] = {}
    for file in component.files:
        found = comfy.utils.load_torch_file(str(file), safe_load=True)
        # As the index says: a shard may hold a copy of another's tensor.
        merged.update({n: t for n, t in found.items() if component.file_of.get(n) == file})
    return merged


def _dtype_options(weight_dtype: str) -> dict[str, Any]:
    if weight_dtype == "default":
        return {}
    options: dict[str, Any] = {"dtype": getattr(torch, f"float8_{weight_dtype.split('_')[1]}")}
    if weight_dtype.endswith("_fast"):
        options["fp8_optimizations"] = True
    return options


def _clip_options(sources: Sources) -> dict[str, Any]:
    return {
        "embedding_directory": folder_paths.get_folder_paths("embeddings"),
        "clip_type": comfy.sd.CLIPType.LUMINA2,
        "model_options": {"qwen3_4b_model_config": dict(sources.text_config)},
    }


def _checked(clip: comfy.sd.CLIP) -> comfy.sd.CLIP:
    model = clip.cond_stage_model
    if not isinstance(model, ZImageTEModel):
        raise ValueError(
            f"the text encoder must be a Qwen3-4B, ComfyUI read it as {type(model).__name__}: "
            "choose qwen_3_4b.safetensors"
        )
    return clip
