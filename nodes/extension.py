"""The extension that the host loads: its routes, and an ordered list of node classes."""

from comfy_api.latest import ComfyExtension, io

from .attention_slice import AttentionSlice
from .fit_to_vram import FitToVRAM
from .gradient_checkpoint import ApplyGradientCheckpoint
from .host.base.server import add_route
from .host.fit import route as fit_route
from .host.probe import route as probe_route
from .lean_vae import LeanVAE
from .load_model import LoadZImageTurbo
from .vram_probe import VRAMProbe


class ZImageLowVRAM(ComfyExtension):
    """Z-Image Low VRAM."""

    async def on_load(self) -> None:
        add_route("POST", "/z_image_low_vram/fit", fit_route.answer)
        add_route("GET", "/z_image_low_vram/probes/{prompt_id}", probe_route.answer)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadZImageTurbo,
            FitToVRAM,
            ApplyGradientCheckpoint,
            AttentionSlice,
            LeanVAE,
            VRAMProbe,
        ]
