"""FLUX.1 and FLUX.2, and the models of the host that are made of their blocks."""

from __future__ import annotations

from typing import Any

import comfy.ldm.chroma.layers as chroma_layers
import comfy.ldm.chroma.model as chroma
import comfy.ldm.chroma_radiance.model as chroma_radiance
import comfy.ldm.flux.layers as layers
import comfy.ldm.flux.model as flux

from ...denoiser import families
from ...denoiser.products import ELEMENT_BITS
from ...denoiser.sizes import TransformerSizes
from .activations import activation_of, feed_forward_of
from .family import Family
from .flux_blocks import LeanDouble, LeanLast, LeanSingle
from .projections import Stored, as_stored


def _is_possible(part: Any) -> bool:
    """True for the blocks of FLUX.1 and FLUX.2, and not for others of the same classes."""
    if isinstance(part, layers.DoubleStreamBlock):
        return all(feed_forward_of(mlp) is not None for mlp in (part.img_mlp, part.txt_mlp))
    return not isinstance(part, layers.SingleStreamBlock) or bool(activation_of(part.mlp_act))


def _sizes_of(denoiser: Any, blocks: list[Any]) -> TransformerSizes:
    """The sizes of the transformer, of which these blocks are known."""
    dim, heads, params = denoiser.hidden_size, denoiser.num_heads, denoiser.params
    hidden = int(dim * params.mlp_ratio)
    is_gated = getattr(params, "mlp_silu_act", False) or getattr(params, "yak_mlp", False)
    is_packed = type(denoiser) is chroma.Chroma  # its latent's channels are counted with a patch
    ours = {module for block in blocks for module in block.modules()}
    ours -= {module.lin for module in ours if isinstance(module, layers.Modulation)}
    # What the host's single block holds of a token at its peak: linear1's product, silu and their
    # product; or what attention made and the joined rows; or those as linear2 quantises them.
    stock = 5 * dim + 4 * hidden if is_gated else 6 * dim + 2 * hidden
    joined = dim + hidden
    stock = max(
        stock, 3 * dim + hidden + joined + joined * Stored.of(ours).row_bits // ELEMENT_BITS
    )
    sizes = TransformerSizes(
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=hidden,
        layers=len(denoiser.double_blocks) + len(denoiser.single_blocks),
        refiner_layers=0,
        cap_dim=params.context_in_dim,
        patch=denoiser.patch_size,
        channels=params.in_channels // (denoiser.patch_size**2 if is_packed else 1),
        pad_multiple=1,
        is_gated=is_gated,
        is_parallel=True,
        stock_elements=stock,
    )
    return as_stored(sizes, denoiser, ours)


def _published(sizes: TransformerSizes) -> families.FamilySizes | None:
    """None for Chroma Radiance, whose last layers may hold more than a block."""
    if sizes.patch > 2:
        return None
    return families.FLUX2_DEV if sizes.patch == 1 else families.FLUX1_DEV


FLUX = Family(
    names=("FLUX.1", "FLUX.2", "Chroma"),
    kinds=(flux.Flux, chroma.Chroma, chroma_radiance.ChromaRadiance),
    parts={
        layers.DoubleStreamBlock: LeanDouble,
        layers.SingleStreamBlock: LeanSingle,
        layers.LastLayer: LeanLast,
        chroma_layers.LastLayer: LeanLast,
    },
    sizes_of=_sizes_of,
    stacks=("double_blocks", "single_blocks"),
    around=("final_layer",),
    published=_published,
    is_possible=_is_possible,
)
