"""Load Z-Image-Turbo: transformer, text encoder and VAE from single files or a diffusers folder."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from comfy_api.latest import io

from .host.base import server
from .host.loader import folders
from .host.loader import load as loaders
from .weights import diffusers_folder, family, stored
from .weights.component import Component, open_file
from .weights.diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE
from .weights.header import WeightsError
from .weights.text_encoder import key_prefix, size_name

logger = logging.getLogger(__name__)

SAME_FOLDER = "from the same folder"
DEFAULT_SHIFT = 3.0
# The host's folder of single files for each part of a diffusers folder.
_KINDS = {TRANSFORMER: "diffusion_models", TEXT_ENCODER: "text_encoders", VAE: "vae"}


class _Sources(NamedTuple):
    """The checked components of a choice of inputs, and what the folder's schedule asks for."""

    transformer: Component
    text_encoder: Component
    vae: Component
    folder: Path | None


class LoadZImageTurbo(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = _options(TRANSFORMER)
        encoders = [SAME_FOLDER, *_options(TEXT_ENCODER)]
        vaes = [SAME_FOLDER, *_options(VAE)]
        return io.Schema(
            node_id="ZImageTurboLoader",
            display_name="Load Z-Image-Turbo",
            category="model/loaders",
            description=(
                "Loads Z-Image-Turbo from single files or from a diffusers folder with shards, "
                "through ComfyUI's own loaders. All files are checked before anything is loaded."
            ),
            search_aliases=["z-image", "zimage", "z image turbo", "diffusers folder", "shards"],
            inputs=[
                io.Combo.Input(
                    "diffusion_model",
                    options=models,
                    default=_likely(models, "z_image", "z-image"),
                    tooltip=(
                        "The transformer: a file of models/diffusion_models, or a diffusers "
                        "folder below models/diffusers (its name ends with a slash). Lower "
                        "weight_dtype, not the choice of layout, saves memory."
                    ),
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=encoders,
                    default=_likely(encoders, "qwen_3_4b", "qwen3_4b", "qwen3-4b"),
                    tooltip=(
                        "Qwen3-4B: a file of models/text_encoders, a diffusers folder, or the "
                        "folder chosen above. A quantised (fp8) file halves its 7.5 GiB."
                    ),
                ),
                io.Combo.Input(
                    "vae",
                    options=vaes,
                    default=_likely(vaes, "ae.safetensors", "flux"),
                    tooltip=(
                        "The VAE of Flux (16 latent channels): a file of models/vae, a diffusers "
                        "folder, or the folder chosen above."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=loaders.WEIGHT_DTYPES,
                    default=loaders.WEIGHT_DTYPES[0],
                    tooltip=(
                        "How the transformer's weights are kept: default as in the file (bf16: "
                        "11.5 GiB), fp8 half of that at some loss of quality. fp8_e4m3fn_fast "
                        "also multiplies in fp8 where the card can."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "shift",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip=(
                        "Timestep shift of the schedule, without unit; 0 = automatic: the "
                        "folder's scheduler_config.json, else 3.0. Higher spends more steps on "
                        "the layout. No effect on memory. A ModelSamplingAuraFlow node behind "
                        "this one overrides it."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="Z-Image's transformer, for samplers and model patches."),
                io.Clip.Output(
                    tooltip="Qwen3-4B with Z-Image's prompt template, for CLIP Text Encode."
                ),
                io.Vae.Output(tooltip="The VAE of Flux, for VAE Decode and VAE Encode."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(
        cls, diffusion_model: str, text_encoder: str, vae: str, **kwargs: Any
    ) -> list[tuple[str, int, int]]:
        """Changes when a chosen file on disk changes, and not otherwise."""
        paths: list[Path] = []
        for part, choice in _choices(diffusion_model, text_encoder, vae).items():
            if choice in (known := _folders()):
                paths += diffusers_folder.files_of(known[choice], part)
            elif not choice.endswith("/"):
                paths.append(folders.file_path(_KINDS[part], choice))
        return diffusers_folder.fingerprint(paths)

    @classmethod
    def execute(
        cls,
        diffusion_model: str,
        text_encoder: str,
        vae: str,
        weight_dtype: str = "default",
        shift: float = 0.0,
    ) -> io.NodeOutput:
        sources = _open(_choices(diffusion_model, text_encoder, vae))
        folder = sources.folder
        hint = diffusers_folder.pipeline_class(folder) if folder else ""
        found = family.z_image(sources.transformer, hint)
        config = family.check_text_encoder(sources.text_encoder, text_width=found.text_width)
        family.check_vae(sources.vae, latent_channels=found.latent_channels)
        if not shift:
            shift = (diffusers_folder.scheduler_shift(folder) if folder else None) or DEFAULT_SHIFT

        steps = (
            functools.partial(_load_model, sources.transformer, found, weight_dtype),
            functools.partial(_load_clip, sources.text_encoder, config),
            functools.partial(loaders.load_vae, sources.vae.files),
        )
        model, clip, loaded_vae = (load() for load in server.with_progress(steps))
        parts = (
            f"{found.name}, {_layers(found.layers)}, {loaders.dtype_name(model)}",
            f"{size_name(config['hidden_size'])}, {_layers(config['num_hidden_layers'])}",
            f"shift {shift:g}",
        )
        text = " · ".join(parts)
        logger.info("Loaded %s", text)
        server.show_text(cls.hidden.unique_id if cls.hidden else None, text)
        return io.NodeOutput(loaders.with_shift(model, shift), clip, loaded_vae)


def _folders() -> dict[str, Path]:
    return diffusers_folder.find_folders(folders.search_paths("diffusers"))


def _options(part: str) -> list[str]:
    with_part = [name for name, folder in _folders().items() if os.path.isdir(folder / part)]
    return [*folders.file_names(_KINDS[part]), *sorted(with_part)]


def _likely(options: list[str], *words: str) -> str | None:
    """The first option that contains one of the words, else the first."""
    named = [o for o in options if any(word in o.lower() for word in words)]
    return next(iter(named or options), None)


def _choices(diffusion_model: str, text_encoder: str, vae: str) -> dict[str, str]:
    """The choice for each part, with "from the same folder" replaced by that folder.

    Raises:
        WeightsError: there is no such folder, as diffusion_model is a file.
    """
    choices = {TRANSFORMER: diffusion_model, TEXT_ENCODER: text_encoder, VAE: vae}
    for part, choice in choices.items():
        if choice == SAME_FOLDER and not diffusion_model.endswith("/"):
            raise WeightsError(
                f"{part} is '{SAME_FOLDER}', but diffusion_model is the file {diffusion_model}: "
                f"choose a file for {part}, or a folder for diffusion_model"
            )
    return {part: diffusion_model if c == SAME_FOLDER else c for part, c in choices.items()}


def _open(choices: dict[str, str]) -> _Sources:
    """Opens the headers of every part; reads no tensor."""
    known = _folders()
    opened: dict[str, Component] = {}
    for part, choice in choices.items():
        if choice in known:
            opened[part] = diffusers_folder.open_part(known[choice], choice, part)
        elif choice.endswith("/"):
            raise WeightsError(
                f"{choice} is not below the diffusers folder: refresh the page (R) and choose again"
            )
        else:
            opened[part] = open_file(folders.file_path(_KINDS[part], choice), choice)
    folder = known.get(choices[TRANSFORMER])
    return _Sources(opened[TRANSFORMER], opened[TEXT_ENCODER], opened[VAE], folder)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def _load_model(component: Component, found: family.ZImage, weight_dtype: str):
    if component.is_file:
        return loaders.load_model_file(component.files[0], weight_dtype=weight_dtype)
    targets = {}
    if found.is_diffusers:
        targets = loaders.diffusers_targets(layers=found.layers, dim=found.dim)
    tensors = functools.partial(stored.state_dict, component, targets)
    return loaders.load_model_shards(component.files, tensors, weight_dtype=weight_dtype)


def _load_clip(component: Component, config: dict[str, Any]):
    prefix = key_prefix(component.tensors) or ""
    # The host's loader of files knows Qwen3 by this prefix only.
    if component.is_file and prefix == "model.":
        return loaders.load_clip_file(component.files[0], config)
    tensors = functools.partial(stored.state_dict, component)
    return loaders.load_clip_shards(component.files, tensors, config, prefix=prefix)
