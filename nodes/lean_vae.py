"""Lean VAE: the whole decode and encode, without tiles, at a fraction of the peak."""

from __future__ import annotations

from comfy_api.latest import io

from .host.base.server import NodeLog
from .host.vae.forward import VaeSettings
from .host.vae.patch import example_call, with_lean_vae
from .host.vae.video_patch import is_wan, with_lean_video
from .prefer import PREFERENCES, Prefer
from .vae.choice import VaeChoice
from .vae.video.choice import VideoChoice

# The picture's side for which the node tells the peak.
EXAMPLE_PX = 1024


class LeanVAE(io.ComfyNode):
    """The node's schema is its documentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ZImageLeanVAE",
            display_name="Lean VAE",
            category="model/patch/z-image",
            description=(
                "Lowers the memory peak of VAE decode and encode, with the same picture up to "
                "rounding. The picture is computed in strips of rows, with the statistics of the "
                "whole picture, so there are no tiles and no seams. It works on the VAEs of "
                "Z-Image, Flux, SD3, SDXL, SD1.5, Qwen-Image and Wan (2.1 and 2.2), for pictures "
                "and videos. Another VAE passes through unchanged."
            ),
            search_aliases=["vae low vram", "tiled vae", "exact tiled", "no seams"],
            inputs=[
                io.Vae.Input(
                    "vae", tooltip="The VAE. It is not changed; the output is a patched copy."
                ),
                io.Combo.Input(
                    "prefer",
                    options=list(PREFERENCES),
                    default="balance",
                    tooltip=(
                        "Less memory for more computing; at 1024x1024: speed takes half of "
                        "ComfyUI's peak and computes nothing twice. balance takes a quarter, for "
                        "up to a quarter more arithmetic. smallest takes less than 0.1 on NVIDIA "
                        "and AMD cards, for two thirds more arithmetic and copies to RAM and back. "
                        "Other devices, encodes and models: see the help page."
                    ),
                ),
                io.Int.Input(
                    "strip_rows",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Rows of a strip, in pixels of the picture. Fewer save a little memory, "
                        "and the card is less busy. 0 = automatic: the fewest strips that raise "
                        "the peak by about a tenth (smallest) or a fifth at 1024x1024, and by more "
                        "for small pictures."
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
    def execute(cls, vae, prefer: Prefer = "balance", strip_rows: int = 0) -> io.NodeOutput:
        log = NodeLog("Lean VAE", cls.hidden.unique_id if cls.hidden else None)
        if is_wan(vae):
            lean, reason = with_lean_video(vae, VideoChoice(prefer, strip_rows), log)
            if reason is None:
                log.say(lean.first_stage_model.decode.report(EXAMPLE_PX, vae.vae_dtype, vae.device))
        else:
            chosen = VaeChoice(prefer, strip_rows)
            lean, reason = with_lean_vae(vae, VaeSettings(lambda call, device: chosen), log)
            if reason is None:
                log.say(chosen.report(example_call(lean, EXAMPLE_PX)))
        if reason is not None:
            log.say(f"this VAE is left unchanged: {reason}")
        return io.NodeOutput(lean)
