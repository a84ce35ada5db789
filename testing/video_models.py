"""Small Wan VAEs of the host's own class; the same at full size on fake tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch
from pack.nodes.vae.devices import is_unrolled
from pack.nodes.vae.video.layers import AttentionBlock, VideoLayers
from pack.nodes.vae.video.run import decode, encode
from pack.nodes.vae.video.sizes import VideoCall, VideoPlan
from pack.testing.card_tracker import CardTracker
from pack.testing.tracker import Tracker
from pack.testing.vae_models import Arithmetic, filled
from torch._subclasses.fake_tensor import FakeTensorMode

# Which WanVAE: that of Wan 2.1 and Qwen-Image, or that of Wan 2.2's 5B model.
Version = Literal["2.1", "2.2"]
VERSIONS: tuple[Version, ...] = ("2.1", "2.2")


def wan_model(version: Version, dim: int, channels: int = 3) -> Any:
    """A WanVAE as the host makes it, of `dim` channels at the picture's size."""
    from comfy.ldm.wan import vae, vae2_2

    if version == "2.2":
        # Its decoder is wider, as the published one is.
        return vae2_2.WanVAE(
            dim=dim, dec_dim=dim * 8 // 5, z_dim=48, temperal_downsample=[False, True, True]
        )
    return vae.WanVAE(
        dim=dim, z_dim=16, temperal_downsample=[False, True, True],
        image_channels=channels, conv_out_channels=channels,
    )  # fmt: skip


def wan_state(
    dim: int = 16, seed: int = 0, channels: int = 3, version: Version = "2.1"
) -> dict[str, torch.Tensor]:
    """Random weights of the Wan class, in the layout of its files."""
    made = filled(wan_model(version, dim, channels).state_dict(), seed)
    for name, weight in made.items():
        if name.endswith("gamma"):
            made[name] = 1 + 0.2 * torch.randn(weight.shape)
    return made


def wan_vae(
    dim: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    channels: int = 3,
    version: Version = "2.1",
) -> Any:
    """A VAE of the Wan class, as the host detects it.

    It attends with torch's attention, as the host does on most cards: on a CPU it splits.
    """
    import comfy.ldm.modules.diffusionmodules.model as kl
    import comfy.sd
    from comfy.ldm.wan import vae2_2
    from comfy.ldm.wan.vae import AttentionBlock

    state = wan_state(dim, seed, channels, version)
    # The host makes Wan 2.2's at its published width, whatever the file's.
    made, widths = vae2_2.WanVAE, {"dim": dim, "dec_dim": dim * 8 // 5}
    with patch.object(vae2_2, "WanVAE", lambda **config: made(**{**config, **widths})):
        vae = comfy.sd.VAE(sd=state, dtype=dtype)
    for part in vae.first_stage_model.modules():
        if type(part) is AttentionBlock:
            part.optimized_attention = kl.pytorch_attention
    return vae


class FakeVideoVae:
    """The host's full-size WanVAE on fake tensors of a card. Attention counts as fused."""

    def __init__(self, version: Version = "2.1", *, dtype: torch.dtype = torch.bfloat16) -> None:
        from comfy.ldm.wan import vae as wan

        self.version: Version = version
        self.factor = {"2.1": 8, "2.2": 16}[version]
        self.dtype, self.mode, self.arithmetic = dtype, FakeTensorMode(), Arithmetic()
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.mode, torch.device("cuda"):
                self.model = wan_model(version, {"2.1": 96, "2.2": 160}[version]).eval()
        finally:
            torch.set_default_dtype(default)
        for part in self.model.modules():
            if type(part) is wan.AttentionBlock:
                part.optimized_attention = self._attended_as_the_host

    def call(
        self, height: int, width: int, frames: int = 1, *, is_decoder: bool = True
    ) -> VideoCall:
        """One sample's decode or encode of a video of so many frames."""
        from pack.nodes.host.vae import video_layers

        sizes = video_layers.sizes(self.model, is_decoder=is_decoder)
        given = (frames - 1) // 4 + 1 if is_decoder else frames
        unrolled = is_unrolled(torch.device("cuda"))
        return VideoCall(sizes, given, height, width, self.dtype.itemsize, unrolled)

    def measure(self, call: VideoCall, plan: VideoPlan) -> Tracker:
        """One decode or encode on a card: what it held."""
        from pack.nodes.host.vae import video_layers

        is_decoder = call.sizes.is_decoder
        with torch.inference_mode(), self.mode, CardTracker() as tracker:
            x = self._given(call)
            layers = _attending(
                video_layers.read(self.model, x, is_decoder=is_decoder), self._attended
            )
            self.arithmetic = Arithmetic()
            with self.arithmetic:
                run = decode if is_decoder else encode
                run(x, layers, call, plan, write=lambda *rows: None, tick=lambda share: None)
        return tracker

    def stock(self, call: VideoCall) -> Tracker:
        """What the host's own decode or encode holds."""
        with torch.inference_mode(), self.mode, CardTracker() as tracker:
            x = self._given(call)
            self.arithmetic = Arithmetic()
            with self.arithmetic:
                (self.model.decode if call.sizes.is_decoder else self.model.encode)(x)
        return tracker

    def _given(self, call: VideoCall) -> torch.Tensor:
        if call.sizes.is_decoder:
            channels, sides = call.sizes.links[0].given, call.sides()
        else:
            channels, sides = 3, (call.height, call.width)
        shape = (1, channels, call.frames, *sides)
        return torch.empty(shape, dtype=self.dtype, device="cuda")

    def _attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.arithmetic.total += 2 * query.numel() * key.shape[2]
        return torch.empty_like(query)

    def _attended_as_the_host(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """The copies of the host's pytorch_attention, [B, C, H, W]."""
        shape = query.shape
        query, key, value = (
            t.view(shape[0], 1, shape[1], -1).transpose(2, 3).contiguous()
            for t in (query, key, value)
        )
        self.arithmetic.total += 2 * query.numel() * key.shape[2]
        return torch.empty_like(query).transpose(2, 3).reshape(shape)


def _attending(layers: VideoLayers, attend: Callable[..., torch.Tensor]) -> VideoLayers:
    """The layers with another attention, of all queries at a time."""
    links = [
        dataclasses.replace(
            part,
            layers=dataclasses.replace(
                part.layers, attend=attend, most_queries=lambda keys: keys.shape[2]
            ),
        )
        if isinstance(part, AttentionBlock)
        else part
        for part in layers.links
    ]
    return VideoLayers(links, layers.convolve)
