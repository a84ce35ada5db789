"""The kernels by the names under which the host's room is handed them."""

from __future__ import annotations

from types import SimpleNamespace

from .denoiser.attention_half import Heads, add_attention
from .denoiser.feed_forward_half import add_feed_forward
from .denoiser.rows import Modulation, Projection, chunks

BLOCK = SimpleNamespace(
    add_attention=add_attention,
    add_feed_forward=add_feed_forward,
    projection=Projection,
    modulation=Modulation,
    heads=Heads,
    chunks=chunks,
)
