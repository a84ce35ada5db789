"""Small models of FLUX.1 and FLUX.2 for the tests of Apply Gradient Checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import attention_models, lean_models
from .families import FAMILIES

NARROW = {"hidden_size": 256, "num_heads": 2, "context_in_dim": lean_models.TEXT_WIDTH}
_FLUX1 = {**FAMILIES["FLUX.1 dev"].config, **NARROW, "vec_in_dim": 32}
_FLUX2 = {**FAMILIES["FLUX.2 dev"].config, **NARROW}
_OVIS = {"yak_mlp": True, "txt_norm": True, "vec_in_dim": None, "guidance_embed": False}
# The host's detection gives Chroma's inner widths whatever is in the file.
_CHROMA = {**FAMILIES["Chroma"].config, **NARROW, "out_dim": 256, "hidden_dim": 64, "n_layers": 1}
_RADIANCE = {
    **_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3,
    "patch_size": 16, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1,
    "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "FLUX.2": _FLUX2,
    "FLUX.1": _FLUX1,
    "klein": {**_FLUX2, "guidance_embed": False},
    "Ovis": {**_FLUX1, **_OVIS, "txt_ids_dims": [1, 2]},
    "Chroma": _CHROMA,
    "ChromaRadiance": _RADIANCE,
}
MAIN = ("FLUX.2", "FLUX.1")
KINDS = {"FLUX.2": "Flux2", "klein": "Flux2", "FLUX.1": "Flux", "Ovis": "FluxSchnell"}
TOKENS = {"FLUX.2": 77, "FLUX.1": 130, "klein": 77, "Ovis": 77, "Chroma": 130, "ChromaRadiance": 77}


def built(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A ModelPatcher of the host's own class with seeded weights."""
    import comfy.supported_models
    from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

    config = dict(CONFIGS[name])
    if name == "ChromaRadiance":  # of which older hosts know less
        known = {field.name for field in dataclasses.fields(ChromaRadianceParams)}
        config = {key: value for key, value in config.items() if key in {*known, "image_model"}}
    kind = getattr(comfy.supported_models, KINDS.get(name, name))
    model = attention_models._built(kind(dict(config)), config, seed)
    for part, module in model.model.diffusion_model.named_children():
        if part != "nerf_image_embedder":  # which has a dtype of its own
            module.to(dtype)
    model.model.diffusion_model.dtype = dtype
    return model


def channels(name: str) -> int:
    """Of the latent."""
    return 16 if name == "Chroma" else CONFIGS[name]["in_channels"]


def lean(model: Any, **options: Any) -> Any:
    """The model behind our node, in pieces so small that the test's pictures have several."""
    return lean_models.lean(model, **options)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward(model: Any, name: str, *, batch: int = 1, side: int = 30, **more: Any) -> torch.Tensor:
    """One call of the transformer, with the model's patches in place as in sampling."""
    from .stock_forward import installed

    with installed(model) as options:
        denoiser = model.model.diffusion_model
        dtype = denoiser.dtype
        config = CONFIGS[name]
        side = side * config["patch_size"]
        latent = drawn(batch, channels(name), side, side, dtype=dtype, seed=1)
        text = drawn(batch, TOKENS[name], NARROW["context_in_dim"], dtype=dtype, seed=2)
        more.setdefault("guidance", torch.full((batch,), 3.5, dtype=dtype))
        if name == "FLUX.1":
            more.setdefault("y", drawn(batch, 32, dtype=dtype, seed=3))
        more["transformer_options"] = {**options, **more.get("transformer_options", {})}
        time = torch.full((batch,), 0.7, dtype=dtype)
        return denoiser(latent, time, text, **more)


def given(name: str) -> dict[str, Any]:
    """Noise and prompts for `sample`: 576 tokens and the text, in several chunks."""
    side = 24 * CONFIGS[name]["patch_size"]
    noise = drawn(1, channels(name), side, side, dtype=torch.float32, seed=1)
    pooled = drawn(1, 32, dtype=torch.float32, seed=3)
    prompt = lean_models.prompt(pooled_output=pooled)
    return {"noise": noise, "positive": prompt, "negative": prompt}


def weights(name: str) -> dict[str, torch.Tensor]:
    """Of a transformer, by their names in a file; the host recognises the family by them."""
    state = built(name).model.diffusion_model.state_dict()
    return {key: weight.clone() for key, weight in state.items()}


def loaded(weights: dict[str, torch.Tensor], **options: Any) -> Any:
    """What the host's loader makes of a file with these weights."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=options)


def is_quantised(key: str) -> bool:
    """Whether quantised files have the weight in fewer bits: of the linear layers of blocks."""
    return "_blocks." in key and key.endswith(".weight") and "norm" not in key
