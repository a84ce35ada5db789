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
                "rounding: rows of the picture are computed in strips, with the statistics of the "
                "whole picture, so there are no tiles and no seams. For the VAEs of Z-Image, Flux, "
                "SD3, SDXL and SD1.5, and of Qwen-Image and Wan (2.1 and 2.2), images and videos; "
                "another VAE is passed through as it is."
            ),
            search_aliases=["vae low vram", "tiled vae", "exact tiled", "no seams"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE; it stays as it is, the output is a copy."),
                io.Combo.Input(
                    "prefer",
                    options=list(PREFERENCES),
                    default="balance",
                    tooltip=(
                        "speed: half of the stock peak, nothing computed twice. balance: a "
                        "quarter of it for a tenth (float32) to a quarter (bf16) more arithmetic. "
                        "smallest: below 0.1 on NVIDIA and AMD cards, where the large maps wait in "
                        "RAM and are copied, for two thirds more arithmetic; elsewhere 0.14 for "
                        "twice to two and a half times the arithmetic. That is decode at "
                        "1024x1024; encode: 0.5, 0.3 and 0.2 for up to two fifths more. Smaller "
                        "pictures save less. Qwen-Image and Wan compute nothing twice: half, a "
                        "quarter, or as little as the shortest sensible strips hold."
                    ),
                ),
                io.Int.Input(
                    "strip_rows",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Rows of a strip, in pixels of the picture. Fewer save a little memory "
                        "and keep a card less busy. 0 = automatic: the fewest strips that raise "
                        "the peak by about a tenth (smallest) or a fifth at 1024x1024; by more in "
                        "small pictures, whose strips must fill a card."
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
