"""Wan 2.1 and 2.2: attention among the video's tokens, then to the text, then the feed-forward."""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.model as wan

from ...denoiser import families
from ...denoiser.sizes import TransformerSizes
from .family import Family
from .projections import as_stored
from .wan_blocks import LeanBlock
from .wan_ends import LeanHead, LeanPatches

# Layers of the cross attention that are called with the text, or with a picture.
OF_CONTEXT = ("k", "v", "k_img", "v_img")


def _sizes_of(denoiser: Any, blocks: list[Any]) -> TransformerSizes:
    dim, heads, ffn_dim = denoiser.dim, denoiser.num_heads, denoiser.ffn_dim
    ours = {module for part in blocks for module in part.modules()}
    for part in blocks:  # ComfyUI's own layers compute what there is to attend to
        across = part.cross_attn
        ours.difference_update(getattr(across, name, None) for name in OF_CONTEXT)
    sizes = TransformerSizes(
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
        is_gated=False,
        makes_streams=True,
        norms_across=True,
        # Two streams, the rows of the feed-forward, and its GELU beside what it is of.
        stock_elements=3 * dim + 2 * ffn_dim,
    )
    return as_stored(sizes, denoiser, ours)


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
