"""What the attention tests share: tiny models of the host, short ways to patch and to record."""

from __future__ import annotations

from typing import Any

import torch

# Sizes of `inputs`.
BATCH, HEADS, QUERIES, KEYS, CHANNELS = 2, 6, 160, 77, 32


def function(name: str) -> Any:
    """One of the host's attention functions."""
    import comfy.ldm.modules.attention as attention

    return getattr(attention, name)


def sliced(model: Any, mode: str = "auto", size: int = 0) -> Any:
    """The model that the node returns."""
    from pack.nodes.attention_slice import AttentionSlice

    return AttentionSlice.execute(model, mode, size).args[0]


def options(model: Any) -> dict[str, Any]:
    """The model's transformer_options."""
    return model.model_options["transformer_options"]


def with_override(model: Any, override: Any) -> Any:
    """A clone with another pack's override in the slot."""
    clone = model.clone()
    options(clone)["optimized_attention_override"] = override
    return clone


class Recorder:
    """An override that keeps the shapes it sees and calls the function."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, tuple[int, ...], int]] = []

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        query = args[0] if args else kwargs.get("q", kwargs.get("query"))
        heads = args[3] if len(args) > 3 else kwargs["heads"]
        self.seen.append((function.__name__, tuple(query.shape), heads))
        return function(*args, **kwargs)


def draw(*shape: int, seed: int) -> torch.Tensor:
    """Seeded normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    *, skip_reshape: bool, keys: int = KEYS, kv_heads: int = HEADS, dtype: Any = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Query, key and value of a cross-attention, in one of the host's two layouts."""
    q = draw(BATCH, QUERIES, HEADS, CHANNELS, seed=0)
    k, v = (draw(BATCH, keys, kv_heads, CHANNELS, seed=seed) for seed in (1, 2))
    # As the host's models lay them out: token by token, with skip_reshape as views by head.
    return tuple(
        t.to(dtype).transpose(1, 2) if skip_reshape else t.to(dtype).flatten(2) for t in (q, k, v)
    )


def patcher(model: torch.nn.Module) -> Any:
    """The host's ModelPatcher around a model, on the CPU."""
    from comfy.model_patcher import ModelPatcher

    cpu = torch.device("cpu")
    return ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _built(model_config: Any, unet_config: dict[str, Any], seed: int) -> Any:
    model_config.unet_config = unet_config
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.diffusion_model.state_dict().values():  # all that a checkpoint would fill
        torch.nn.init.normal_(tensor, std=0.1, generator=generator)
    return patcher(model.eval())


def stable_diffusion(*, seed: int = 0) -> Any:
    """A U-Net of Stable Diffusion 1's layout: self- and cross-attention with 4 heads."""
    import comfy.supported_models

    unet_config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "num_heads": 4,
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "context_dim": 48,
        "legacy": False,
        "adm_in_channels": None,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
    }
    return _built(comfy.supported_models.SD15(unet_config), unet_config, seed)


def stable_diffusion_3(*, seed: int = 0) -> Any:
    """A transformer of Stable Diffusion 3, which Apply Gradient Checkpoint does not know."""
    import comfy.supported_models

    config = {
        "in_channels": 16,
        "depth": 1,
        "patch_size": 2,
        "input_size": None,
        "pos_embed_scaling_factor": None,
        "pos_embed_max_size": 8,
        "num_patches": 64,
        "adm_in_channels": 32,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 48, "out_features": 64},
        },
    }
    return _built(comfy.supported_models.SD3(dict(config)), config, seed)


def sample(
    model: Any, *, cfg: float = 2.0, channels: int = 4, width: int = 48, **asked: Any
) -> torch.Tensor:
    """Two Euler steps from seeded noise, 24 x 16 latent pixels, two prompts of 7 and 5 tokens.

    Args:
        asked: what the prompts carry beside their text, such as a ControlNet.
    """
    import comfy.sample

    noise = draw(1, channels, 24, 16, seed=1)
    positive, negative = ([[draw(1, tokens, width, seed=tokens), dict(asked)]] for tokens in (7, 5))
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            2,
            cfg,
            "euler",
            "simple",
            positive,
            negative,
            torch.zeros_like(noise),
            seed=1,
            disable_pbar=True,
        )
