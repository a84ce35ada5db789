"""Other families' transformers at full width on fake tensors: the host's classes, exact bytes.

As testing/stock_forward.py does for Z-Image. A few blocks of each kind stand for all of them, which
peak alike. The caller's tensors count as allocations; the weights do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from pack.testing.stock_forward import (
    QUANTISED,
    Route,
    Weights,
    installed,
    quantise,
    sdpa_options,
)
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode

# Blocks of each kind: the stream of the first comes from an embedder, that of the next from a
# block.
BLOCKS = 2


@dataclass(frozen=True)
class Family:
    """A published model of the host.

    supported: its class in comfy.supported_models.
    dim: width of the residual stream, in elements.
    cell: pixels of a token's side; a frame of a video after the first stands for `frames` of them.
    channels, latent_px: of the latent; pixels of its cell's side.
    text: width of the text's hidden states, in elements.
    config: what the host's detection says of its file, with `BLOCKS` blocks.
    inputs: widths of vectors that it is called with besides, by their names; 0 for one number.
    joins_text: the text's tokens are part of the stream.
    """

    supported: str
    dim: int
    cell: int
    channels: int
    latent_px: int
    text: int
    config: Mapping[str, Any]
    inputs: Mapping[str, int] = field(default_factory=dict)
    frames: int = 0
    joins_text: bool = True


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
    "Flux2", 6144, 16, 128, 16, 15360,
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
    return Family(
        "Flux2", dim, 16, 128, 16, text, {**FLUX2.config, **sizes, "guidance_embed": False}
    )


FLUX1 = Family(
    "Flux", 3072, 16, 16, 8, 4096,
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
    "Chroma", 3072, 16, 16, 8, 4096,
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
    "QwenImage", 3072, 16, 16, 8, 3584,
    {"image_model": "qwen_image", "in_channels": 64, "num_layers": BLOCKS}, frames=1,
)  # fmt: skip
WAN = Family(
    "WAN21_T2V", 5120, 16, 16, 8, 4096,
    {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 5120, "ffn_dim": 13824,
        "num_heads": 40, "num_layers": BLOCKS,
        "in_dim": 16, "out_dim": 16, "text_dim": 4096, "cross_attn_norm": True,
    },
    frames=4, joins_text=False,
)  # fmt: skip
# The U-Nets' streams and cells are those of the level with the most elements in a transformer.
SDXL = Family(
    "SDXL", 640, 16, 4, 8, 2048,
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
    "SD15", 320, 8, 4, 8, 768,
    {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True,
        "legacy": False, "adm_in_channels": None, "model_channels": 320,
        "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "channel_mult": [1, 2, 4, 4], "transformer_depth_middle": 1,
        "use_linear_in_transformer": False, "context_dim": 768, "num_heads": 8,
        "num_head_channels": -1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_temporal_attention": False, "use_temporal_resblock": False,
    },
    joins_text=False,
)  # fmt: skip
FAMILIES = {
    "FLUX.2 dev": FLUX2, "FLUX.2 klein 9B": _klein(4096, 12288),
    "FLUX.2 klein 4B": _klein(3072, 7680), "FLUX.1 dev": FLUX1, "Chroma": CHROMA,
    "Qwen-Image": QWEN_IMAGE, "Wan 2.1 14B": WAN, "SDXL": SDXL, "SD1.5": SD15,
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
    "SDXL": (Call(1024, 1024, 77, batch=2), Call(2048, 2048, 77, batch=2)),
    "SD1.5": (Call(512, 512, 77, batch=2), Call(1024, 1024, 77, batch=2)),
}  # fmt: skip


def fake_device() -> torch.device:
    """A card, where torch is built for one."""
    return torch.device("cuda" if torch.backends.cuda.is_built() else "cpu")


def build(
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_mixed: bool = False,
    **changed: Any,
) -> Any:
    """The host's BaseModel; `changed` entries of its configuration differ.

    Args:
        is_mixed: with the layers of checkpoints that have quantised ones.
    """
    import comfy.ops
    import comfy.supported_models

    config = {**family.config, **changed}
    model_config = getattr(comfy.supported_models, family.supported)(config)
    model_config.set_inference_dtype(dtype, None)
    if is_mixed:
        model_config.custom_operations = comfy.ops.mixed_precision_ops({}, dtype)
    return model_config.get_model({}, "", device=device)


def latent_shape(family: Family, call: Call) -> tuple[int, ...]:
    """[B, C, H, W]; [B, C, F, H, W] where the family has frames."""
    sides = (call.height_px // family.latent_px, call.width_px // family.latent_px)
    frames = (1 + (call.frames - 1) // family.frames,) if family.frames else ()
    return (call.batch, family.channels, *frames, *sides)


def stream_bytes(family: Family, call: Call, dtype: torch.dtype = torch.bfloat16) -> int:
    """U: bytes of one residual stream. A text that is only attended to is not part of it."""
    *_, height, width = latent_shape(family, call)
    frames = math.prod(latent_shape(family, call)[2:-2])
    scale = family.cell // family.latent_px
    tokens = frames * (height // scale) * (width // scale) * (1 + call.references)
    joined = call.text_tokens if family.joins_text else 0
    return call.batch * (tokens + joined) * family.dim * dtype.itemsize


class FakeFamily:
    """The host's BaseModel of a family with fake weights, as `FakeDenoiser` is Z-Image's.

    Args:
        weights: "plain", or "streamed" or "int8" as `FakeDenoiser` has them.
        changed: see `build`.
    """

    def __init__(
        self,
        family: Family,
        *,
        dtype: torch.dtype = torch.bfloat16,
        weights: Weights = "plain",
        changed: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.family, self.dtype = family, dtype
        self.device, self.mode = fake_device(), FakeTensorMode()
        is_in_ram = weights in ("streamed", "int8")
        device = torch.device("cpu") if is_in_ram else self.device
        with self.mode, device:
            quantised = QUANTISED.get(weights)
            self.model = build(
                family, dtype=dtype, device=device, is_mixed=quantised is not None, **changed
            )
            if quantised:
                quantise(
                    self.model.diffusion_model, quantised, dtype, lambda path: "_blocks." in path
                )
        for layer in self.model.modules() if is_in_ram else ():
            if hasattr(layer, "comfy_cast_weights"):  # as the host's ModelPatcher.load sets it
                layer.comfy_cast_weights = True

    def patcher(self) -> Any:
        """A fresh ModelPatcher for nodes to clone and patch; SDPA attention is chosen on it."""
        from comfy.model_patcher import ModelPatcher

        with self.mode:
            patcher = ModelPatcher(self.model, load_device=self.device, offload_device=self.device)
        patcher.model_options["transformer_options"].update(sdpa_options(self.device))
        return patcher

    def measure(
        self,
        call: Call,
        *,
        patcher: Any = None,
        route: Route = "model",
        around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda called: called,
        **tracking: Any,
    ) -> Tracker:
        """Runs one forward of the transformer as in sampling, and returns what it held.

        Args:
            patcher, route, around: as for `FakeDenoiser.measure`.
            tracking: options of Tracker; attention is "flash" unless named.
        """
        family, dtype, batch = self.family, self.dtype, call.batch
        tracker = Tracker(**{"attention": "flash", "on": self.device.type, **tracking})
        with (
            torch.inference_mode(),
            installed(self.patcher() if patcher is None else patcher) as options,
            self.mode,
            self.device,
        ):
            shape = latent_shape(family, call)
            is_model = route == "model"
            called = self.model.diffusion_model if is_model else self.model.apply_model
            kept = dtype if is_model else torch.float32
            given = [torch.empty(shape, dtype=kept), torch.empty(batch, dtype=kept)]
            text = torch.empty(batch, call.text_tokens, family.text, dtype=dtype)
            more: dict[str, Any] = {
                name: torch.empty((batch, width) if width else batch, dtype=dtype)
                for name, width in family.inputs.items()
            }
            if call.references:
                made = [torch.empty(shape, dtype=dtype) for _ in range(call.references)]
                more["ref_latents"] = made
            more["context" if is_model else "c_crossattn"] = text
            with tracker:
                tracker.watch(*given, text, *more.get("ref_latents", ()))
                around(called)(*given, **more, transformer_options=options)
        return tracker


def measure(
    family: Family,
    call: Call,
    *,
    dtype: torch.dtype = torch.bfloat16,
    changed: Mapping[str, Any] = MappingProxyType({}),
    patched: Callable[[Any], Any] = lambda patcher: patcher,
    **tracking: Any,
) -> Tracker:
    """Runs one forward of a family's transformer as in sampling, and returns what it held.

    Args:
        changed: see `build`.
        patched: what nodes make of the ModelPatcher.
        tracking: see `FakeFamily.measure`.
    """
    fake = FakeFamily(family, dtype=dtype, changed=changed)
    return fake.measure(call, patcher=patched(fake.patcher()), **tracking)
