"""The kernels by the names under which the host's room is handed them."""

from __future__ import annotations

from types import SimpleNamespace

from . import lean_vae, vae_layers
from .attention import Heads, add_attention
from .feed_forward import add_feed_forward
from .rows import Modulation, Projection, chunks

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
