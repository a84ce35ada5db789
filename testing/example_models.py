"""Small models of the host's own classes for the example workflows; a text encoder stands in."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import attention_models
from .families import FAMILIES
from .vae_models import kl_vae
from .video_models import wan_vae

TEXT_WIDTH = 64
_FLUX = {"hidden_size": 256, "num_heads": 2, "context_in_dim": TEXT_WIDTH}
_WAN = {"dim": 256, "ffn_dim": 640, "num_heads": 2, "text_dim": TEXT_WIDTH}
NARROW: dict[str, dict[str, Any]] = {
    "Wan 2.1 14B": _WAN,
    "Wan 2.2 5B": _WAN,
    "Qwen-Image": {"num_attention_heads": 2, "joint_attention_dim": TEXT_WIDTH},
    "FLUX.1 dev": {**_FLUX, "vec_in_dim": TEXT_WIDTH},
    "FLUX.2 dev": _FLUX,
    "SDXL": {
        "model_channels": 64, "context_dim": TEXT_WIDTH,
        "adm_in_channels": 6 * 256 + TEXT_WIDTH,  # six sizes, and the pooled text
        "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 2,
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    },
}  # fmt: skip


class Models(NamedTuple):
    """What the loaders of a workflow give."""

    model: Any
    clip: Any
    vae: Any


def transformer(family: str, seed: int = 0) -> Any:
    """A ModelPatcher of the family with few narrow blocks and seeded weights, float32."""
    import comfy.supported_models

    config = {**FAMILIES[family].config, **NARROW[family]}
    supported = getattr(comfy.supported_models, FAMILIES[family].supported)
    return attention_models._built(supported(dict(config)), config, seed)


class TextEncoder:
    """Stands in for a text encoder: random hidden states that depend on the text alone.

    Longer texts have more tokens, so that a positive and a negative prompt do not share a call,
    whose rounding would be another one.
    """

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list[Any]:
        generator = torch.Generator().manual_seed(zlib.crc32(tokens.encode()))
        states = torch.randn(1, 8 + len(tokens) // 4, TEXT_WIDTH, generator=generator)
        return [[states, {"pooled_output": states[:, 0]}]]


VAES: dict[str, Callable[[], Any]] = {
    "Wan 2.1 14B": lambda: wan_vae(8),
    "Wan 2.2 5B": lambda: wan_vae(10, version="2.2"),
    "Qwen-Image": lambda: wan_vae(8),
    "FLUX.1 dev": lambda: kl_vae(latent=16),
    "FLUX.2 dev": lambda: kl_vae(latent=32, is_packed=True),
    "SDXL": kl_vae,
}


def models(family: str) -> Models:
    """What the loaders of the family's workflows give, small."""
    return Models(transformer(family), TextEncoder(), VAES[family]())


class Example(NamedTuple):
    """A workflow of another family.

    family: its key in testing/families.py.
    small: inputs of nodes, by the node's type or id, with which it runs in seconds; None takes
        one away.
    """

    family: str
    small: dict[str, dict[str, Any]]


SIDE_PX = 384  # 576 tokens of a picture: automatic chunks are 256
STEPS = {"KSampler": {"steps": 2}}
IMAGE = {"EmptySD3LatentImage": {"width": SIDE_PX, "height": SIDE_PX}, **STEPS}
EXAMPLES = {
    "wan_2_1_low_vram": Example(
        "Wan 2.1 14B",
        {"EmptyHunyuanLatentVideo": {"width": 192, "height": 192, "length": 5}, **STEPS},
    ),
    "wan_2_2_5b_low_vram": Example(
        "Wan 2.2 5B",
        {"Wan22ImageToVideoLatent": {"width": SIDE_PX, "height": SIDE_PX, "length": 9}, **STEPS},
    ),
    "qwen_image_low_vram": Example("Qwen-Image", IMAGE),
    # The text nodes make a megapixel of each reference; without a VAE the second makes none.
    "qwen_image_edit_low_vram": Example(
        "Qwen-Image", {"KSampler": {"steps": 1, "cfg": 1.0}, "13": {"vae": None}}
    ),
    # Both checkpoints give the same model.
    "sdxl_low_vram": Example(
        "SDXL",
        {
            "EmptyLatentImage": {"width": SIDE_PX, "height": SIDE_PX},
            "KSamplerAdvanced": {"steps": 3},
            "11": {"end_at_step": 2},
            "12": {"start_at_step": 2},
        },
    ),
    "flux_1_dev_low_vram": Example("FLUX.1 dev", IMAGE),
    "flux_2_dev_low_vram": Example(
        "FLUX.2 dev",
        {"ImageScaleToTotalPixels": {"megapixels": 0.1}, "Flux2Scheduler": {"steps": 2}},
    ),
}
