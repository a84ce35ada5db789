"""The U-Nets of SDXL and Stable Diffusion: which parts are replaced, and by what."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import comfy.ldm.modules.attention as attention
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel

from ...denoiser.sizes import TransformerSizes
from ...denoiser.unet_cuts import map_strips
from ...denoiser.unet_peak import UNETS, UNetSizes
from .block import BlockSettings
from .family import Family
from .replaced import LeanPart, OnHandover, Replaced
from .unet_blocks import LeanTransformer, is_known_block, sizes_of
from .unet_maps import LeanResBlock, LeanUpsample, is_known_res_block, is_known_upsample

STAGES = ("input_blocks", "middle_block", "output_blocks")


class Layer(NamedTuple):
    """A layer of the U-Net.

    name: as ModelPatcher knows it.
    scale: latent pixels of a side of what it is given, in each of its own.
    """

    name: str
    module: Any
    scale: int


def layers(denoiser: Any) -> Iterator[Layer]:
    """The layers in the order of the forward. Some may be replaced by a clone in use."""
    scale = 1
    for stage in STAGES:
        blocks = getattr(denoiser, stage)
        of_stage = [(stage, blocks)]
        if stage != "middle_block":
            of_stage = [(f"{stage}.{i}", block) for i, block in enumerate(blocks)]
        for name, block in of_stage:
            for i, module in enumerate(block or ()):
                yield Layer(f"diffusion_model.{name}.{i}", module, scale)
                if _resamples(module, openaimodel.Downsample):
                    scale *= 2
                elif _resamples(module, openaimodel.Upsample):
                    scale = max(1, scale // 2)


def block_names(denoiser: Any) -> dict[str, int]:
    """The transformer blocks that are lean, in the order of the forward; the scale of each."""
    return {
        f"{layer.name}.transformer_blocks.{i}": layer.scale
        for layer in layers(denoiser)
        if type(layer.module) is attention.SpatialTransformer
        for i, block in enumerate(layer.module.transformer_blocks)
        if type(_own(block)) is not attention.BasicTransformerBlock or is_known_block(_own(block))
    }


def published(denoiser: Any, sizes: TransformerSizes) -> UNetSizes | None:
    """The U-Net that predictions are made of, where this one has its levels and plain weights."""
    scales = {scale for name, scale in block_names(denoiser).items() if "middle" not in name}
    for unet in UNETS.values():
        wanted = (
            unet.channels,
            unet.factors,
            {unet.blocks},
            {2**level for level, attends in enumerate(unet.attends) if attends},
            replace(unet.sizes(unet.top), layers=sizes.layers),
        )
        found = (
            denoiser.model_channels,
            tuple(denoiser.channel_mult),
            set(denoiser.num_res_blocks),
            scales,
            sizes,
        )
        if found == wanted:
            return unet
    return None


def skip_elements(denoiser: Any, height: int, width: int, *, with_first: bool) -> int:
    """Elements of one picture's skip tensors, with the first or without; sides of the latent."""
    total = channels = 0
    found = [layer for layer in layers(denoiser) if ".input_blocks." in layer.name]
    for layer, after in zip(found, [*found[1:], None], strict=True):
        channels = getattr(layer.module, "out_channels", channels)
        is_last = after is None or after.name.rpartition(".")[0] != layer.name.rpartition(".")[0]
        if is_last and (with_first or layer is not found[0]):
            scale = layer.scale * (2 if _resamples(layer.module, openaimodel.Downsample) else 1)
            total += channels * -(-height // scale) * -(-width // scale)
    return total


def _resamples(module: Any, kind: type) -> bool:
    return any(isinstance(each, kind) for each in (module, getattr(module, "h_upd", None)))


def map_names(denoiser: Any) -> dict[str, int]:
    """The other parts that are lean; the scale of each."""
    return {
        layer.name: layer.scale for layer in layers(denoiser) if _is_known_map(_own(layer.module))
    }


def _own(part: Any) -> Any:
    """The host's part, where a clone in use has replaced it."""
    return part.stock[0] if isinstance(part, Replaced) else part


def _is_known_map(part: Any) -> bool:
    return is_known_res_block(part) or is_known_upsample(part)


def _sizes_of(denoiser: Any, blocks: list[Any]) -> TransformerSizes:
    """Those of the stream with the most elements."""
    names = block_names(denoiser)
    scales = {id(_own(denoiser.get_submodule(n.partition(".")[2]))): s for n, s in names.items()}

    def scale(block: Any) -> int:
        return scales.get(id(_own(block)), 1)

    def elements(block: Any) -> float:  # of a stream, in each pixel of the latent
        return block.n_heads * block.d_head / scale(block) ** 2

    # Other nodes may have put in copies, of which the scale is not known.
    own = [block for block in blocks if id(_own(block)) in scales] or blocks
    ordered = sorted(own, key=elements, reverse=True)
    return sizes_of(ordered, patch=scale(ordered[0]), channels=denoiser.in_channels)


class UNetFamily(Family):
    """Blocks lie in spatial transformers; ResBlocks and upsamplings are the parts around them."""

    def has(self, denoiser: Any) -> bool:
        # Packs derive theirs from the host's (Kolors).
        return isinstance(denoiser, self.kinds) and bool(block_names(denoiser))

    def block_names(self, denoiser: Any) -> list[str]:
        return list(block_names(denoiser))

    def around_names(self, denoiser: Any) -> list[str]:
        return list(map_names(denoiser))

    def every_second(self, denoiser: Any) -> list[str]:
        return self.block_names(denoiser)[::2]

    def left_out(self, denoiser: Any) -> list[str]:
        parts = [_own(layer.module) for layer in layers(denoiser)]
        transformers = [part for part in parts if isinstance(part, attention.SpatialTransformer)]
        blocks = [_own(block) for part in transformers for block in part.transformer_blocks]
        maps = [p for p in parts if isinstance(p, openaimodel.ResBlock | openaimodel.Upsample)]
        of_kinds = {
            "transformer blocks": [is_known_block(block) for block in blocks],
            "ResBlocks and Upsamples": [_is_known_map(part) for part in maps],
        }
        return [
            f"{known.count(False)} of {len(known)} {kind} are of an unknown kind"
            for kind, known in of_kinds.items()
            if not all(known)
        ]

    def lean(
        self, denoiser: Any, name: str, part: Any, settings: BlockSettings, on_handover: OnHandover
    ) -> LeanPart:
        if is_known_block(part):
            return LeanTransformer(part, settings, on_handover)
        scale, made, out = map_names(denoiser)[name], part.channels, part.out_channels
        is_upsample = is_known_upsample(part)
        kind = LeanUpsample if is_upsample else LeanResBlock
        scale = scale / 2 if is_upsample else scale
        strips = map_strips(settings.sizes, settings.choice, made, out, scale)
        return kind(part, strips, on_handover)


UNET = UNetFamily(
    names=("SDXL", "Stable Diffusion 1.5"),
    kinds=(openaimodel.UNetModel,),
    parts={
        attention.BasicTransformerBlock: LeanTransformer,
        openaimodel.ResBlock: LeanResBlock,
        openaimodel.Upsample: LeanUpsample,
    },
    sizes_of=_sizes_of,
    stacks=(),
    is_possible=lambda part: is_known_block(part) or _is_known_map(part),
)
