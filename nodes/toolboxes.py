"""The kernels by the names under which the host's room is handed them."""

from __future__ import annotations

from types import SimpleNamespace

from .denoiser.attention_half import Heads, add_attention
from .denoiser.feed_forward_half import add_feed_forward
from .denoiser.rows import Modulation, Projection, chunks
from .vae import coders as lean_vae
from .vae import layers as vae_layers

BLOCK = SimpleNamespace(
    add_attention=add_attention,
    add_feed_forward=add_feed_forward,
    projection=Projection,
    modulation=Modulation,
    heads=Heads,
    chunks=chunks,
)
VAE = SimpleNamespace(
    decode=lean_vae.decode,
    encode=lean_vae.encode,
    norm_layer=vae_layers.NormLayer,
    conv_layer=vae_layers.ConvLayer,
    block_layers=vae_layers.BlockLayers,
    attention_layers=vae_layers.AttentionLayers,
    level_layers=vae_layers.LevelLayers,
    vae_layers=vae_layers.VaeLayers,
)
