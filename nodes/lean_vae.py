"""Lean VAE: the exact decode and encode at a fraction of the peak."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import NamedTuple

import torch
from comfy_api.latest import io

from .host import lean_vae, notice
from .kernels import lean_vae as kernels
from .kernels import vae_layers as layers
from .memory.vae_peak import lean_vae_peak_bytes, lean_vae_work, stock_vae_peak_bytes
from .memory.vae_plan import PREFERENCES, VaePlan, VaeSizes, vae_plan

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
# What the host reckons with over the live bytes, for the allocator and the workspaces of
# convolutions, and what attention holds that is not fused. Not measured on a card.
RESERVED, SPARE_BYTES = 1.5, 64 * MIB


class LeanVAE(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLeanVAE",
            display_name="Lean VAE",
            category="model/patch/z-image",
            description=(
                "Lowers the memory peak of VAE decode and encode, with the same picture: rows of "
                "the picture are computed in strips, with the statistics of the whole picture, so "
                "there are no tiles and no seams. For the VAEs of Z-Image, Flux, SD3, SDXL and "
                "SD1.5; another VAE is passed through as it is."
            ),
            search_aliases=["vae low vram", "tiled vae", "exact tiled", "no seams"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE; it stays as it is, the output is a copy."),
                io.Combo.Input(
                    "prefer",
                    options=list(PREFERENCES),
                    default="balance",
                    tooltip=(
                        "speed: 0.4 of the stock peak, nothing computed twice. balance: 0.2 of "
                        "it for a tenth (float32) to a quarter (bf16) more arithmetic. smallest: "
                        "below 0.1 on NVIDIA cards, where the large maps wait in RAM and are "
                        "copied, which costs time; elsewhere 0.1 for about twice the arithmetic. "
                        "That is decode; encode: 0.5, 0.3 and 0.2 for up to two fifths more."
                    ),
                ),
                io.Int.Input(
                    "strip_rows",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Rows of a strip, in pixels of the picture. Fewer save a little memory "
                        "and keep a card less busy. 0 = automatic."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[
                io.Vae.Output(tooltip="The VAE with the patch, for decode, encode and inpaint."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, vae, prefer: str = "balance", strip_rows: int = 0) -> io.NodeOutput:
        chosen = Chosen(prefer, strip_rows)
        settings = lean_vae.VaeSettings(KERNELS, chosen.plan, chosen.work, chosen.need)
        node_id = cls.hidden.unique_id if cls.hidden else None
        lean, reason = lean_vae.with_lean_vae(vae, settings, node_id)
        if reason is None:
            text = chosen.report(lean_vae.example_call(lean, 1024))
        else:
            text = f"this VAE stays stock: {reason}"
        logger.info("Lean VAE: %s", text)
        notice.show_text(node_id, text)
        return io.NodeOutput(lean)


class Chosen(NamedTuple):
    """What was set on the node; answers what a call needs."""

    prefer: str
    strip_rows: int

    def plan(self, call: lean_vae.Call, attempt: int = 0) -> VaePlan:
        """What to store for the call, after so many that ran out of memory."""
        return vae_plan(
            VaeSizes(**call.sizes),
            call.height,
            call.width,
            prefer=self.prefer,
            strip_rows=self.strip_rows,
            has_ram=call.device.type == "cuda",
            # In half types the rounded sums of taps would add to the error.
            is_fused=call.dtype == torch.float32,
            attempt=attempt,
        )

    def work(self, call: lean_vae.Call, plan: VaePlan) -> int:
        """Multiply-adds of the call."""
        return lean_vae_work(VaeSizes(**call.sizes), call.height, call.width, plan)

    def need(self, call: lean_vae.Call) -> int:
        """Bytes that the host shall reckon with."""
        return int(RESERVED * self._peak_bytes(call)) + SPARE_BYTES

    def report(self, call: lean_vae.Call) -> str:
        """What the node does, in one line."""
        parts = []
        for scale in (1, 2):
            here = call._replace(height=scale * call.height, width=scale * call.width)
            stock = stock_vae_peak_bytes(
                VaeSizes(**here.sizes), here.height, here.width, here.dtype.itemsize
            )
            parts.append(
                f"{stock / MIB:.0f} -> {self._peak_bytes(here) / MIB:.0f} MiB predicted at "
                f"{here.width}x{here.height}"
            )
        return f"decode {' · '.join(parts)}, exact"

    def _peak_bytes(self, call: lean_vae.Call) -> int:
        sizes = VaeSizes(**call.sizes)
        return lean_vae_peak_bytes(
            sizes, call.height, call.width, call.dtype.itemsize, self.plan(call)
        )
