"""Wan 2.1 and 2.2: attention among the video's tokens, then to the text, then the feed-forward."""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.model as wan

from ...denoiser import families
from ...denoiser.sizes import TransformerSizes
from .family import Family
from .projections import has_whole
from .wan_blocks import LeanBlock
from .wan_ends import LeanHead, LeanPatches


def _sizes_of(denoiser: Any, blocks: list[Any]) -> TransformerSizes:
    dim, heads, ffn_dim = denoiser.dim, denoiser.num_heads, denoiser.ffn_dim
    return TransformerSizes(
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=ffn_dim,
        layers=len(denoiser.blocks),
        refiner_layers=0,
        cap_dim=denoiser.text_dim,
        patch=denoiser.patch_size[-1],
        channels=denoiser.out_dim,
        pad_multiple=1,
        is_whole=has_whole(blocks),
        is_gated=False,
        makes_streams=True,
        norms_across=True,
        # Two streams, the rows of the feed-forward, and its GELU beside what it is of.
        stock_elements=3 * dim + 2 * ffn_dim,
    )


WAN = Family(
    names=("Wan",),
    kinds=(wan.WanModel, wan.CameraWanModel),
    parts={wan.WanAttentionBlock: LeanBlock, wan.Head: LeanHead},
    sizes_of=_sizes_of,
    stacks=("blocks",),
    around=("head",),
    published=lambda sizes: families.WAN_14B,
    forwards={"patch_embedding": LeanPatches},
)
