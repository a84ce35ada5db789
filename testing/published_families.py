"""Published models of other families, as the host's detection describes their files.

nodes/denoiser/families.py has what our formulas count of them; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

# Blocks of each kind: the stream of the first comes from an embedder, that of the next from a
# block.
BLOCKS = 2


@dataclass(frozen=True)
class Family:
    """A published model of the host.

    supported: its class in comfy.supported_models.
    dim: width of the residual stream, in elements.
    text: width of the text's hidden states, in elements.
    config: what the host's detection says of its file, with `BLOCKS` blocks.
    inputs: widths of vectors that it is called with besides, by their names; 0 for one number.
    cell: pixels of a token's side.
    frames: of a video, for each frame of the latent after the first.
    joins_text: the text's tokens are part of the stream.
    """

    supported: str
    dim: int
    text: int
    config: Mapping[str, Any]
    inputs: Mapping[str, int] = field(default_factory=dict)
    cell: int = 16
    frames: int = 0
    joins_text: bool = True

    @property
    def channels(self) -> int:
        """Of the latent."""
        return self._latent_format.latent_channels

    @property
    def latent_px(self) -> int:
        """Pixels of the side of a latent's cell."""
        return self._latent_format.spacial_downscale_ratio

    @property
    def _latent_format(self) -> Any:
        import comfy.supported_models

        return getattr(comfy.supported_models, self.supported).latent_format


@dataclass(frozen=True)
class Call:
    """One call: pixels, the text's tokens, reference pictures of the same size, and samples."""

    width_px: int
    height_px: int
    text_tokens: int
    frames: int = 1
    references: int = 0
    batch: int = 1

    def __str__(self) -> str:
        parts = [f"{self.width_px}x{self.height_px}"]
        if self.frames > 1:
            parts.append(f"{self.frames} frames")
        if self.references:
            parts.append(f"{self.references} references")
        if self.batch > 1:
            parts.append(f"batch {self.batch}")
        return ", ".join(parts)


# Source of the sizes: detect_unet_config in the host's comfy/model_detection.py, and the published
# files that it reads them from.
FLUX2 = Family(
    "Flux2", 6144, 15360,
    {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None,
        "context_in_dim": 15360,
        "hidden_size": 6144, "mlp_ratio": 3.0, "num_heads": 48, "depth": BLOCKS,
        "depth_single_blocks": BLOCKS, "axes_dim": [32, 32, 32, 32], "theta": 2000,
        "patch_size": 1, "qkv_bias": False, "guidance_embed": True, "txt_ids_dims": [3],
        "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
        "default_ref_method": "index", "ref_index_scale": 10.0,
    },
    {"guidance": 0},
)  # fmt: skip


def _klein(dim: int, text: int) -> Family:
    """FLUX.2's smaller models, whose guidance is distilled."""
    sizes = {"context_in_dim": text, "hidden_size": dim, "num_heads": dim // 128}
    return Family("Flux2", dim, text, {**FLUX2.config, **sizes, "guidance_embed": False})


FLUX1 = Family(
    "Flux", 3072, 4096,
    {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768,
        "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": BLOCKS,
        "depth_single_blocks": BLOCKS, "axes_dim": [16, 56, 56], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
    },
    {"guidance": 0, "y": 768},
)  # fmt: skip
CHROMA = Family(
    "Chroma", 3072, 4096,
    {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": None,
        "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
        "depth": BLOCKS, "depth_single_blocks": BLOCKS, "axes_dim": [16, 56, 56], "theta": 10000,
        "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [], "in_dim": 64, "out_dim": 3072,
        "hidden_dim": 5120, "n_layers": 5,
    },
    {"guidance": 0},
)  # fmt: skip
QWEN_IMAGE = Family(
    "QwenImage", 3072, 3584,
    {"image_model": "qwen_image", "in_channels": 64, "num_layers": BLOCKS}, frames=1,
)  # fmt: skip
WAN = Family(
    "WAN21_T2V", 5120, 4096,
    {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "ffn_dim": 13824,
        "num_heads": 40, "num_layers": BLOCKS,
        "in_dim": 16, "out_dim": 16, "text_dim": 4096, "cross_attn_norm": True,
    },
    frames=4, joins_text=False,
)  # fmt: skip
WAN_5B = replace(
    WAN, supported="WAN22_T2V", dim=3072, cell=32,
    config={
        **WAN.config, "dim": 3072, "ffn_dim": 14336, "num_heads": 24, "in_dim": 48, "out_dim": 48,
    },
)  # fmt: skip
# The U-Nets' streams and cells are those of the level with the most elements in a transformer.
SDXL = Family(
    "SDXL", 640, 2048,
    {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True,
        "legacy": False, "num_classes": "sequential", "adm_in_channels": 2816,
        "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
        "transformer_depth_middle": 10, "use_linear_in_transformer": True, "context_dim": 2048,
        "num_head_channels": 64, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_temporal_attention": False, "use_temporal_resblock": False,
    },
    {"y": 2816}, joins_text=False,
)  # fmt: skip
SD15 = Family(
    "SD15", 320, 768,
    {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True,
        "legacy": False, "adm_in_channels": None, "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1,
        "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8,
        "num_head_channels": -1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_temporal_attention": False, "use_temporal_resblock": False,
    },
    cell=8, joins_text=False,
)  # fmt: skip
FAMILIES = {
    "FLUX.2 dev": FLUX2, "FLUX.2 klein 9B": _klein(4096, 12288),
    "FLUX.2 klein 4B": _klein(3072, 7680), "FLUX.1 dev": FLUX1, "Chroma": CHROMA,
    "Qwen-Image": QWEN_IMAGE, "Wan 2.1 14B": WAN, "Wan 2.2 5B": WAN_5B, "SDXL": SDXL,
    "SD1.5": SD15,
}  # fmt: skip
CALLS = {
    "FLUX.2 dev": (
        Call(1024, 1024, 512), Call(2048, 2048, 512), Call(1024, 1024, 512, references=3)
    ),
    "FLUX.2 klein 9B": (Call(1024, 1024, 512), Call(1024, 1024, 512, references=2)),
    "FLUX.2 klein 4B": (Call(1024, 1024, 512), Call(1024, 1024, 512, references=2)),
    "FLUX.1 dev": (Call(1024, 1024, 512), Call(2048, 2048, 512)),
    "Chroma": (Call(1024, 1024, 512), Call(2048, 2048, 512)),
    "Qwen-Image": (Call(1024, 1024, 256), Call(2048, 2048, 256)),
    "Wan 2.1 14B": (Call(832, 480, 512, frames=81), Call(1280, 720, 512, frames=81)),
    "Wan 2.2 5B": (Call(1280, 704, 512, frames=121),),
    "SDXL": (Call(1024, 1024, 77, batch=2), Call(2048, 2048, 77, batch=2)),
    "SD1.5": (Call(512, 512, 77, batch=2), Call(1024, 1024, 77, batch=2)),
}  # fmt: skip
