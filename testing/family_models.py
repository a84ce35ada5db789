"""Small models of other families for the tests of Apply Gradient Checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from . import attention_models, lean_models
from .families import FAMILIES


class Small(NamedTuple):
    """A model of a family.

    supported: its class in comfy.supported_models.
    config: as of `Family`, narrowed.
    channels, frames: of its latents; no frames: [B, C, H, W].
    cell: the latent's pixels of a token's side.
    sides: tokens of a side, with several chunks of tokens: of `forward` and of `given`.
    text: tokens, of `forward`.
    stacks: the attributes with its blocks.
    hooked: layers of its first blocks, one of each kind.
    inputs: widths of vectors that it is called with besides, by their names; 0 for one number.
    heads: of the calls of the attention, where one head is computed at a time.
    """

    supported: str
    config: Mapping[str, Any]
    channels: int
    frames: int | None
    cell: int
    sides: tuple[int, int]
    text: int
    stacks: tuple[str, ...]
    hooked: tuple[str, ...]
    inputs: Mapping[str, int] = MappingProxyType({})
    heads: frozenset[int] = frozenset({1})


def _flux(supported: str, config: Mapping[str, Any], *, text: int = 77, **more: Any) -> Small:
    """One that is made of FLUX's blocks."""
    cell = config["patch_size"]
    channels = 16 if supported == "Chroma" else config["in_channels"]
    more = {"hooked": _OF_FLUX, "inputs": {"guidance": 0}, **more}
    stacks = ("double_blocks", "single_blocks")
    return Small(supported, config, channels, None, cell, (30, 24), text, stacks, **more)


def _wan(
    supported: str, config: Mapping[str, Any], hooked: tuple[str, ...] = (), channels: int = 16
) -> Small:
    hooked = (*_OF_WAN, *hooked)
    return Small(
        supported, config, channels, 3, 2, (18, 18), 77, ("blocks",), hooked,
        heads=frozenset({1, 2}),  # that attend to the text
    )  # fmt: skip


def _first(stack: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{stack}.0.{name}" for name in names)


_OF_FLUX = (
    *_first("double_blocks", "img_norm1", "txt_attn.qkv", "img_attn.qkv", "img_attn.proj"),
    *_first("double_blocks", "img_mlp.0", "txt_mlp.2"),
    *_first("single_blocks", "pre_norm", "linear1", "linear2"),
)
_OF_OVIS = tuple(n for n in _OF_FLUX if "mlp" not in n) + _first(
    "double_blocks", "img_mlp.gate_proj", "img_mlp.up_proj", "txt_mlp.down_proj"
)
_OF_QWEN = _first(
    "transformer_blocks", "img_norm1", "txt_norm2", "attn.to_q", "attn.add_k_proj", "attn.norm_q",
    "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj",
    "img_mlp.net.2", "txt_mlp.net.2",
)  # fmt: skip
_OF_WAN = _first(
    "blocks", "norm1", "norm2", "norm3", "self_attn.q", "self_attn.k", "self_attn.v",
    "self_attn.norm_k", "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.norm_q",
    "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
_OF_PICTURE = _first("blocks", "cross_attn.k_img", "cross_attn.v_img")

_NARROW = {"hidden_size": 256, "num_heads": 2, "context_in_dim": lean_models.TEXT_WIDTH}
_FLUX1 = {**FAMILIES["FLUX.1 dev"].config, **_NARROW, "vec_in_dim": 32}
_FLUX2 = {**FAMILIES["FLUX.2 dev"].config, **_NARROW}
_OVIS = {
    **_FLUX1, "yak_mlp": True, "txt_norm": True, "vec_in_dim": None, "guidance_embed": False,
    "txt_ids_dims": [1, 2],
}  # fmt: skip
# The host's detection gives Chroma's inner widths whatever is in the file.
_CHROMA = {**FAMILIES["Chroma"].config, **_NARROW, "out_dim": 256, "hidden_dim": 64, "n_layers": 1}
_RADIANCE = {
    **_CHROMA, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3,
    "patch_size": 16, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 1,
    "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": False,
}  # fmt: skip
_QWEN = {
    **FAMILIES["Qwen-Image"].config, "num_attention_heads": 2,
    "joint_attention_dim": lean_models.TEXT_WIDTH,
}  # fmt: skip
_WAN = {
    **FAMILIES["Wan 2.1 14B"].config, "dim": 256, "ffn_dim": 640, "num_heads": 2,
    "text_dim": lean_models.TEXT_WIDTH,
}  # fmt: skip
_I2V = {**_WAN, "model_type": "i2v", "in_dim": 36}
SMALL: dict[str, Small] = {
    "FLUX.2": _flux("Flux2", _FLUX2),
    "FLUX.1": _flux("Flux", _FLUX1, text=130, inputs={"guidance": 0, "y": 32}),
    "klein": _flux("Flux2", {**_FLUX2, "guidance_embed": False}),
    "Ovis": _flux("FluxSchnell", _OVIS, hooked=_OF_OVIS),
    "Chroma": _flux("Chroma", _CHROMA, text=130),
    "ChromaRadiance": _flux("ChromaRadiance", _RADIANCE),
    "Qwen-Image": Small(
        "QwenImage", _QWEN, 16, 1, 2, (30, 30), 77, ("transformer_blocks",), _OF_QWEN
    ),
    "Wan": _wan("WAN21_T2V", _WAN),
    "Wan i2v": _wan("WAN21_I2V", _I2V, _OF_PICTURE),
    "Wan without norms": _wan("WAN21_T2V", {**_WAN, "cross_attn_norm": False}),
    "Wan 2.2 5B": _wan("WAN22_T2V", {**_WAN, "in_dim": 48, "out_dim": 48}, channels=48),
    "Wan Fun control": _wan("WAN21_FunControl2V", {**_I2V, "in_dim": 48, "in_dim_ref_conv": 16}),
    "Wan camera": _wan("WAN21_Camera", {**_I2V, "model_type": "camera", "in_dim": 32}),
}
# What tests of all are done with.
NAMES = tuple(name for name in SMALL if name not in ("Wan 2.2 5B", "Wan Fun control", "Wan camera"))
FLUX = tuple(name for name, small in SMALL.items() if len(small.stacks) == 2)
WAN = tuple(name for name in SMALL if name.startswith("Wan"))
# One of each family: what costs time is done with these.
MAIN = ("FLUX.2", "FLUX.1", "Qwen-Image", "Wan", "Wan i2v")
# The host recognises the others by their published widths alone.
LOADABLE = ("FLUX.2", "FLUX.1")
LAST = {
    **dict.fromkeys(FLUX, "final_layer"),
    "Qwen-Image": "norm_out",
    **dict.fromkeys(WAN, "head"),
}


def _config(name: str) -> tuple[Any, dict[str, Any]]:
    import comfy.supported_models
    from comfy.ldm.chroma_radiance.model import ChromaRadianceParams

    config = dict(SMALL[name].config)
    if name == "ChromaRadiance":  # of which older hosts know less
        known = {field.name for field in dataclasses.fields(ChromaRadianceParams)}
        config = {key: value for key, value in config.items() if key in {*known, "image_model"}}
    return getattr(comfy.supported_models, SMALL[name].supported)(dict(config)), config


def built(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A ModelPatcher of the host's own class with seeded weights."""
    model = attention_models._built(*_config(name), seed)
    denoiser = model.model.diffusion_model
    for part, module in denoiser.named_children():
        if part not in ("nerf_image_embedder", "patch_embedding"):  # which have dtypes of their own
            module.to(dtype)
    denoiser.dtype = dtype
    # As the host's loaders leave it, for copies with weights of their own.
    model.cached_patcher_init = (lambda **_: built(name, dtype, seed), ())
    return model


def weights(name: str) -> dict[str, torch.Tensor]:
    """Of a transformer, by their names in a file."""
    state = built(name).model.diffusion_model.state_dict()
    return {key: weight.clone() for key, weight in state.items()}


def made_of(name: str, weights: Mapping[str, torch.Tensor], **settings: Any) -> Any:
    """A model of such weights, as the host's loader makes it; by that loader, if it is `LOADABLE`.

    Args:
        settings: dtype: of plain weights; custom_operations: the classes of the layers, for
            quantised weights the host's own.
    """
    import comfy.ops
    import comfy.sd

    if name in LOADABLE:
        with torch.inference_mode():
            return comfy.sd.load_diffusion_model_state_dict(dict(weights), model_options=settings)
    config, _ = _config(name)
    dtype = settings.get("dtype", torch.float32)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    config.custom_operations = settings.get("custom_operations")
    if any(key.endswith("comfy_quant") for key in weights):
        config.custom_operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    model = config.get_model({}, "", device="cpu")
    with torch.inference_mode():
        missing, more = model.diffusion_model.load_state_dict(dict(weights), strict=False)
    assert not missing and not more, (missing, more)
    return attention_models.patcher(model.eval())


def is_quantised(key: str) -> bool:
    """Whether quantised files have the weight in fewer bits: of the linear layers of blocks."""
    return "blocks." in key and key.endswith(".weight") and "norm" not in key


def blocks(name: str, model: Any) -> list[str]:
    """The paths of all blocks within the transformer."""
    denoiser = model.model.diffusion_model
    return [f"{s}.{i}" for s in SMALL[name].stacks for i in range(len(getattr(denoiser, s)))]


def block_lora(name: str, model: Any) -> dict[str, torch.Tensor]:
    """A LoRA on linear layers of every block."""
    named = dict(model.model.diffusion_model.named_modules())
    paths = [
        f"{block}.{layer.split('.', 2)[2]}"
        for block in blocks(name, model)
        for layer in SMALL[name].hooked
        if layer.startswith(block.partition(".")[0])
    ]
    linear = [path for path in paths if hasattr(named[path], "in_features")]
    return lean_models.lora_file((n, named[n].in_features, named[n].out_features) for n in linear)


def hooked_layers(name: str, model: Any) -> Iterator[Any]:
    """One layer of each kind of the first blocks."""
    denoiser = model.model.diffusion_model
    return (denoiser.get_submodule(path) for path in SMALL[name].hooked)
