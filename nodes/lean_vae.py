"""Lean VAE: the exact decode and encode at a fraction of the peak."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from comfy_api.latest import io

from .host import lean_vae, notice
from .kernels import lean_vae as kernels
from .kernels import vae_layers as layers
from .memory.vae_plan import PREFERENCES, VaeSizes, vae_plan
from .memory.vae_peak import lean_vae_peak_bytes, lean_vae_work

logger = logging.getLogger(__name__)

KERNELS = SimpleNamespace(
    decode=kernels.decode,
    encode=kernels.encode,
    norm_layer=layers.NormLayer,
    conv_layer=layers.ConvLayer,
    block_layers=layers.BlockLayers,
    attention_layers=layers.AttentionLayers,
    level_layers=layers.LevelLayers,
    vae_layers=layers.VaeLayers,
)
MIB = 2**20
# What a card's allocator and convolution workspaces take over the live bytes; not measured.
RESERVED = 1.5


class LeanVAE(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLeanVAE",
            display_name="Lean VAE",
            category="model/patch/z-image",
            description="x",
            search_aliases=["vae low vram", "tiled vae", "exact tiled", "no seams"],
            inputs=[
                io.Vae.Input("vae", tooltip="x"),
                io.Combo.Input("prefer", options=list(PREFERENCES), default="balance", tooltip="x"),
                io.Int.Input(
                    "strip_rows", default=0, min=0, max=4096, tooltip="x", advanced=True
                ),
            ],
            outputs=[io.Vae.Output(tooltip="x")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, prefer: str = "balance", strip_rows: int = 0) -> io.NodeOutput:
        def plan(call: lean_vae.Call, attempt: int) -> Any:
            return vae_plan(
                VaeSizes(**call.sizes), call.height, call.width,
                prefer=prefer, strip_rows=strip_rows, attempt=attempt,
                has_ram=call.device.type == "cuda",
                is_fused=call.dtype == torch.float32,
            )  # fmt: skip

        def need(call: lean_vae.Call) -> int:
            sizes = VaeSizes(**call.sizes)
            live = lean_vae_peak_bytes(
                sizes, call.height, call.width, call.dtype.itemsize, plan(call, 0)
            )
            return int(RESERVED * live)

        settings = lean_vae.VaeSettings(
            KERNELS, plan,
            lambda call, plan: lean_vae_work(VaeSizes(**call.sizes), call.height, call.width, plan),
            need,
        )  # fmt: skip
        node_id = cls.hidden.unique_id if cls.hidden else None
        lean, reason = lean_vae.with_lean_vae(vae, settings, node_id)
        return io.NodeOutput(lean)
