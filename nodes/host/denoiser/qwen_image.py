"""Qwen-Image and its edit models: two streams joined in one attention."""

from __future__ import annotations

from typing import Any

import comfy.ldm.qwen_image.model as qwen

from ...denoiser import families
from ...denoiser.sizes import TransformerSizes
from .family import Family
from .projections import as_stored, copies_whole
from .qwen_image_blocks import LeanBlock, LeanLast, layers_of

# What the host's block holds of a token at its peak, in streams: two of the picture, the modulated
# rows, and the feed-forward's GELU beside what it is of.
STOCK_STREAMS = 11


def _sizes_of(denoiser: Any, blocks: list[Any]) -> TransformerSizes:
    """The sizes of the transformer, of which these blocks are known."""
    block = blocks[0]
    ours = {module for part in blocks for module in part.modules()}
    for part in blocks:  # the modulation is computed beside the streams alone
        modulation = (*part.img_mod.modules(), *part.txt_mod.modules())
        ours.difference_update(filter(copies_whole, modulation))
    sizes = TransformerSizes(
        dim=block.dim,
        heads=block.num_attention_heads,
        kv_heads=block.num_attention_heads,
        head_dim=block.attention_head_dim,
        ffn_dim=layers_of(block.img_mlp)[1].in_features,
        layers=len(denoiser.transformer_blocks),
        refiner_layers=0,
        cap_dim=denoiser.txt_in.in_features,
        patch=denoiser.patch_size,
        channels=denoiser.in_channels // denoiser.patch_size**2,
        pad_multiple=1,
        is_gated=False,
        makes_streams=True,
        stock_elements=STOCK_STREAMS * block.dim,
    )
    return as_stored(sizes, denoiser, ours)


QWEN_IMAGE = Family(
    names=("Qwen-Image",),
    kinds=(qwen.QwenImageTransformer2DModel,),
    parts={qwen.QwenImageTransformerBlock: LeanBlock, qwen.LastLayer: LeanLast},
    sizes_of=_sizes_of,
    stacks=("transformer_blocks",),
    around=("norm_out",),
    published=lambda sizes: families.QWEN_IMAGE,
)
