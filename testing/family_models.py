"""Small models of Qwen-Image and Wan for the tests of Apply Gradient Checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from . import attention_models, lean_models
from .families import FAMILIES

TEXT, PICTURE = 77, 9


class Small(NamedTuple):
    """A model of a family.

    supported: its class in comfy.supported_models.
    config: as of `Family`, narrowed.
    frames, side: of a latent with several chunks of tokens.
    stack: the attribute with its blocks.
    hooked: layers of the first block, one of each kind.
    """

    supported: str
    config: dict[str, Any]
    frames: int
    side: int
    stack: str
    hooked: tuple[str, ...]


_QWEN = {
    **FAMILIES["Qwen-Image"].config, "num_attention_heads": 2,
    "joint_attention_dim": lean_models.TEXT_WIDTH,
}  # fmt: skip
_WAN = {
    **FAMILIES["Wan 2.1 14B"].config, "dim": 256, "ffn_dim": 640, "num_heads": 2,
    "text_dim": lean_models.TEXT_WIDTH,
}  # fmt: skip
_OF_QWEN = (
    "img_norm1", "txt_norm2", "attn.to_q", "attn.add_k_proj", "attn.norm_q", "attn.to_out.0",
    "attn.to_add_out", "img_mlp.net.0.proj", "txt_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.2",
)  # fmt: skip
_OF_WAN = (
    "norm1", "norm2", "norm3", "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.norm_k",
    "self_attn.o", "cross_attn.q", "cross_attn.k", "cross_attn.norm_q", "cross_attn.o", "ffn.0",
    "ffn.2",
)  # fmt: skip
SMALL = {
    "Qwen-Image": Small("QwenImage", _QWEN, 1, 60, "transformer_blocks", _OF_QWEN),
    "Wan": Small("WAN21_T2V", _WAN, 3, 36, "blocks", _OF_WAN),
    "Wan i2v": Small(
        "WAN21_I2V", {**_WAN, "model_type": "i2v", "in_dim": 36}, 3, 36, "blocks",
        (*_OF_WAN, "cross_attn.k_img", "cross_attn.v_img"),
    ),
    "Wan without norms": Small(
        "WAN21_T2V", {**_WAN, "cross_attn_norm": False}, 3, 36, "blocks", _OF_WAN
    ),
}  # fmt: skip


def _config(name: str) -> Any:
    import comfy.supported_models

    small = SMALL[name]
    return getattr(comfy.supported_models, small.supported)(dict(small.config))


def built(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A ModelPatcher of the host's own class with seeded weights."""
    model = attention_models._built(_config(name), dict(SMALL[name].config), seed)
    denoiser = model.model.diffusion_model
    denoiser.to(dtype).dtype = dtype
    if hasattr(denoiser, "patch_embedding"):  # which stays in float32
        denoiser.patch_embedding.float()
    return model


def weights(name: str) -> dict[str, torch.Tensor]:
    """Of a transformer, by their names in a file."""
    state = built(name).model.diffusion_model.state_dict()
    return {key: weight.clone() for key, weight in state.items()}


def made_of(name: str, weights: dict[str, torch.Tensor], **settings: Any) -> Any:
    """A model of such weights, as the host makes it.

    The host recognises these families by their published widths, so that its loader takes no small
    files.

    Args:
        settings: dtype: of plain weights; custom_operations: the classes of the layers, for
            quantised weights the host's own.
    """
    import comfy.ops

    config = _config(name)
    is_quantised = any(key.endswith("comfy_quant") for key in weights)
    dtype = settings.get("dtype", torch.float32)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    config.custom_operations = settings.get("custom_operations")
    if is_quantised:
        config.custom_operations = comfy.ops.mixed_precision_ops({}, torch.float32)
    model = config.get_model({}, "", device="cpu")
    with torch.inference_mode():
        missing, more = model.diffusion_model.load_state_dict(dict(weights), strict=False)
    assert not missing and not more, (missing, more)
    return attention_models.patcher(model.eval())


def is_quantised(key: str) -> bool:
    """Whether quantised files have the weight in fewer bits: of the linear layers of blocks."""
    return "blocks." in key and key.endswith(".weight") and "norm" not in key


def block_lora(name: str, model: Any) -> dict[str, torch.Tensor]:
    """A LoRA on linear layers of every block."""
    small = SMALL[name]
    named = dict(model.model.diffusion_model.named_modules())
    paths = [
        f"{small.stack}.{i}.{layer}"
        for i in range(len(getattr(model.model.diffusion_model, small.stack)))
        for layer in small.hooked
    ]
    linear = [path for path in paths if hasattr(named[path], "in_features")]
    return lean_models.lora_file((n, named[n].in_features, named[n].out_features) for n in linear)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward(
    model: Any,
    *,
    batch: int = 1,
    frames: int = 0,
    side: int = 0,
    times: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """One call of the transformer, with the model's patches in place as in sampling."""
    from .stock_forward import installed

    with installed(model) as options:
        denoiser = model.model.diffusion_model
        dtype, is_wan = denoiser.dtype, hasattr(denoiser, "patch_embedding")
        small = SMALL["Wan" if is_wan else "Qwen-Image"]
        shape = batch, denoiser.in_dim if is_wan else 16, frames or small.frames
        latent = drawn(*shape, side or small.side, side or small.side, dtype=dtype, seed=1)
        text = drawn(batch, TEXT, lean_models.TEXT_WIDTH, dtype=dtype, seed=2)
        more["transformer_options"] = {**options, **more.get("transformer_options", {})}
        time = torch.full((batch,), 0.7) if times is None else times
        if getattr(denoiser, "img_emb", None) is not None:
            more.setdefault("clip_fea", drawn(batch, PICTURE, 1280, dtype=dtype, seed=3))
        return denoiser(latent, time.to(dtype), text, **more)


def given(name: str) -> dict[str, Any]:
    """Noise and prompts for `sample`, in several chunks."""
    small = SMALL[name]
    noise = drawn(1, 16, small.frames, small.side, small.side, seed=1)
    more = {}
    if small.supported == "WAN21_I2V":
        picture = drawn(1, 16, small.frames, small.side, small.side, seed=4)
        more = {"concat_latent_image": picture, "concat_mask": picture[:, :1]}
    prompt = lean_models.prompt(**more)
    return {"noise": noise, "positive": prompt, "negative": prompt}


class Heard:
    """A lean model whose parts note the reasons for which the host's own ran."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.reasons = lean_models.lean(model, **options), []
        for part in self.model.object_patches.values():
            part._on_handover = self.reasons.append


def hooked_layers(name: str, model: Any) -> Iterator[Any]:
    """One layer of each kind of the first block."""
    small = SMALL[name]
    block = getattr(model.model.diffusion_model, small.stack)[0]
    return (block.get_submodule(path) for path in small.hooked)
