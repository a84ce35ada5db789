"""Load Z-Image-Turbo: transformer, text encoder and VAE from single files or a diffusers folder."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from .host.base import server
from .host.loader import choices, load
from .host.loader.choices import NO_FILE, SAME_FOLDER
from .weights import diffusers_folder
from .weights.diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE
from .weights.header import WeightsError

logger = logging.getLogger(__name__)


class LoadZImageTurbo(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = choices.options(TRANSFORMER) or [NO_FILE]
        encoders = [SAME_FOLDER, *choices.options(TEXT_ENCODER)]
        vaes = [SAME_FOLDER, *choices.options(VAE)]
        return io.Schema(
            node_id="ZImageTurboLoader",
            display_name="Load Z-Image-Turbo",
            category="model/loaders",
            description=(
                "Loads Z-Image-Turbo from single files or from a diffusers folder with shards, "
                "with ComfyUI's own loaders. All files are checked before anything is loaded."
            ),
            search_aliases=["z-image", "zimage", "z image turbo", "diffusers folder", "shards"],
            inputs=[
                io.Combo.Input(
                    "diffusion_model",
                    options=models,
                    default=_likely(models, "z_image", "z-image"),
                    tooltip=(
                        "The transformer: a file in models/diffusion_models, or a diffusers folder "
                        "in models/diffusers (its name ends with a slash). Both take the same "
                        "memory; an fp8 weight_dtype saves memory."
                    ),
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=encoders,
                    default=_likely(encoders, "qwen_3_4b", "qwen3_4b", "qwen3-4b"),
                    tooltip=(
                        "Qwen3-4B: a file in models/text_encoders, a diffusers folder, or the "
                        "folder chosen above. It takes 7.5 GiB; a quantised (fp8) file takes half."
                    ),
                ),
                io.Combo.Input(
                    "vae",
                    options=vaes,
                    default=_likely(vaes, "ae.safetensors", "flux"),
                    tooltip=(
                        "The VAE of Flux (16 latent channels): a file in models/vae, a diffusers "
                        "folder, or the folder chosen above. It takes 0.3 GiB."
                    ),
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=load.WEIGHT_DTYPES,
                    default=load.WEIGHT_DTYPES[0],
                    tooltip=(
                        "How the transformer's weights are stored. default: as in the file (bf16: "
                        "11.5 GiB). fp8: half of that, at some loss of quality. fp8_e4m3fn_fast "
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
                        "Timestep shift of the schedule, no unit. 0 = automatic: from the folder's "
                        "scheduler_config.json, else 3.0. A higher shift spends more steps on the "
                        "layout. A ModelSamplingAuraFlow node after this one overrides it. No "
                        "effect on memory."
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
    def validate_inputs(
        cls,
        diffusion_model: str | None = None,
        text_encoder: str | None = None,
        vae: str | None = None,
    ) -> bool | str:
        """Lets names pass that are in no list: `execute` says in one sentence what is missing.

        The host would say of each input that its value is not in a list. None comes by a link, or
        is an input that the prompt lacks, which the host refuses itself.
        """
        chosen = zip(choices.INPUTS.values(), (diffusion_model, text_encoder, vae), strict=True)
        for name, choice in chosen:
            if choice is not None and not isinstance(choice, str):
                return f"{name} must be a file or folder, got {choice!r}"
        return True

    @classmethod
    def fingerprint_inputs(
        cls, diffusion_model: str | None, text_encoder: str | None, vae: str | None, **kwargs: Any
    ) -> list[tuple[str, int, int]]:
        """Changes when a chosen file on disk changes, and not otherwise.

        Empty where something is missing, which `execute` says, or comes by a link (None).
        """
        try:
            chosen = choices.by_part(diffusion_model, text_encoder, vae)
            return diffusers_folder.fingerprint(choices.files_of(chosen))
        except (FileNotFoundError, WeightsError):
            return []

    @classmethod
    def execute(
        cls,
        diffusion_model: str,
        text_encoder: str,
        vae: str,
        weight_dtype: str = "default",
        shift: float = 0.0,
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id if cls.hidden else None
        try:
            chosen = choices.by_part(diffusion_model, text_encoder, vae)
            sources = choices.open_all(chosen, shift)
        except (FileNotFoundError, WeightsError) as error:
            server.show_text(node_id, str(error))  # the page shows an error inside a long report
            raise
        model, clip, loaded_vae = load.load_all(sources, weight_dtype)
        text = f"{sources.summary(load.dtype_name(model))} · shift {sources.shift:g}"
        logger.info("Loaded %s", text)
        server.show_text(node_id, text)
        return io.NodeOutput(load.with_shift(model, sources.shift), clip, loaded_vae)


def _likely(options: list[str], *words: str) -> str | None:
    """The first option that contains one of the words, else the first."""
    named = [o for o in options if any(word in o.lower() for word in words)]
    return next(iter(named or options), None)
