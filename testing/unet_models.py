"""Small U-Nets of SDXL and Stable Diffusion for the tests of Apply Gradient Checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from . import attention_models
from .families import FAMILIES

TEXT = 64
_SHORT = {
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
}
CONFIGS = {
    "SDXL": {
        **FAMILIES["SDXL"].config, **_SHORT, "model_channels": 64, "context_dim": TEXT,
        "adm_in_channels": 32,
    },
    "SD1.5": {**FAMILIES["SD1.5"].config, "model_channels": 128, "context_dim": TEXT},
}  # fmt: skip


KINDS = {"SDXL": "SDXL", "SD1.5": "SD15"}  # in comfy.supported_models


def built(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changed: Any) -> Any:
    """A ModelPatcher of the host's own class with seeded weights."""
    import comfy.supported_models

    config = {**CONFIGS[name], **changed}
    model_config = getattr(comfy.supported_models, KINDS[name])(dict(config))
    model = attention_models._built(model_config, {**config, "dtype": dtype}, seed)
    denoiser = model.model.diffusion_model
    for parameter in denoiser.parameters():  # 0.1, as for other models, overflows in so many layers
        parameter.data.mul_(0.5)
    denoiser.to(dtype).dtype = dtype
    return model


def lean(model: Any, **options: Any) -> Any:
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    options = {"chunk_tokens": 256, "head_groups": 2, **options}
    return ApplyGradientCheckpoint.execute(model, **options).args[0]


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def forward(
    model: Any,
    name: str,
    *,
    batch: int = 1,
    sides: tuple[int, int] = (48, 40),
    text: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    **more: Any,
) -> torch.Tensor:
    """One call of the U-Net, with the model's patches in place as in sampling.

    Args:
        dtype: of its activations; None: as the weights'.
    """
    from .stock_forward import installed

    with installed(model) as options:
        denoiser = model.model.diffusion_model
        dtype = denoiser.dtype if dtype is None else dtype
        latent = drawn(batch, 4, *sides, dtype=dtype, seed=1)
        context = drawn(batch, 77, TEXT, dtype=dtype, seed=2) if text is None else text
        if name == "SDXL":
            more.setdefault("y", drawn(batch, 32, dtype=dtype, seed=3))
        more["transformer_options"] = {**options, **more.get("transformer_options", {})}
        return denoiser(latent, torch.full((batch,), 700.0), context, **more)


class Heard:
    """A lean model whose parts note the reasons for which the host's own ran."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.reasons = lean(model, **options), []
        for part in self.model.object_patches.values():
            part._on_handover = self.reasons.append


def weights(name: str) -> dict[str, torch.Tensor]:
    """Of a U-Net, by their names in a file."""
    return dict(built(name).model.diffusion_model.state_dict())


def made_of(name: str, weights: dict[str, torch.Tensor], **settings: Any) -> Any:
    """A model of such weights, as the host's loader makes it of a file; see family_models."""
    import comfy.ops
    import comfy.supported_models

    is_quantised = any(key.endswith("comfy_quant") for key in weights)
    config = getattr(comfy.supported_models, KINDS[name])(dict(CONFIGS[name]))
    dtype = settings.get("dtype", torch.float32)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    config.unet_config = {**CONFIGS[name], "dtype": dtype}
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
    layers = (".to_", ".ff.", "emb_layers.1")
    return "_block" in key and key.endswith(".weight") and any(part in key for part in layers)
