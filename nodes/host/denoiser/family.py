"""What describes a family whose parts are replaced under the host's own forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...denoiser.families import FamilySizes
from ...denoiser.sizes import TransformerSizes
from .block import BlockSettings
from .replaced import LeanForward, LeanPart, OnHandover

# Makes the lean part of a part.
MakeFn = Callable[[Any, BlockSettings, OnHandover], LeanPart]
# Makes the lean forward of a layer for one call, whose activations have that dtype.
MakeForwardFn = Callable[[Any, BlockSettings, OnHandover, torch.dtype], LeanForward]


def _always(part: Any) -> bool:
    return True


def _never(sizes: TransformerSizes) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """A family of the host's models.

    names: as users say them.
    kinds: classes of the host's denoiser; subclasses are not known.
    parts: for each class of a block, and of what comes before and after the blocks, its lean part.
    sizes_of: the sizes of a denoiser of which these blocks are known.
    stacks: attributes of the denoiser that list its blocks.
    around: attributes with parts before and after the blocks, replaced with all blocks only, where
        a denoiser has them.
    published: the model that predictions are made of, for those sizes, if there is one.
    is_possible: whether a part of such a class can be replaced.
    forwards: for attributes with one layer, its lean forward; with all blocks only.
    """

    names: tuple[str, ...]
    kinds: tuple[type, ...]
    parts: Mapping[type, MakeFn]
    sizes_of: Callable[[Any, list[Any]], TransformerSizes]
    stacks: tuple[str, ...]
    around: tuple[str, ...] = ()
    published: Callable[[TransformerSizes], FamilySizes | None] = _never
    is_possible: Callable[[Any], bool] = _always
    forwards: Mapping[str, MakeForwardFn] = field(default_factory=dict)

    def has(self, denoiser: Any) -> bool:
        """Whether a denoiser is of this family."""
        return type(denoiser) in self.kinds

    def is_known(self, part: Any) -> bool:
        """Whether a part can be replaced."""
        return type(part) in self.parts and self.is_possible(part)

    def block_names(self, denoiser: Any) -> list[str]:
        """The names of all blocks within the model."""
        return block_names(denoiser, self.stacks)

    def around_names(self, denoiser: Any) -> list[str]:
        """The names of the parts that are replaced with all blocks only."""
        return [f"diffusion_model.{name}" for name in self.around if hasattr(denoiser, name)]

    def every_second(self, denoiser: Any) -> list[str]:
        """Every second block's name."""
        return [n for n in self.block_names(denoiser) if int(n.rpartition(".")[2]) % 2 == 0]

    def left_out(self, denoiser: Any) -> list[str]:
        """Which parts stay the host's because of what they are, in a few words each."""
        return []

    def lean(
        self, denoiser: Any, name: str, part: Any, settings: BlockSettings, on_handover: OnHandover
    ) -> LeanPart:
        """What replaces a known part of that name."""
        return self.parts[type(part)](part, settings, on_handover)


def block_names(denoiser: Any, stacks: Sequence[str]) -> list[str]:
    """The names of all blocks within the model."""
    counts = {stack: len(getattr(denoiser, stack)) for stack in stacks}
    return [f"diffusion_model.{s}.{i}" for s, count in counts.items() for i in range(count)]
