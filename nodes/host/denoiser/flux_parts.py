"""What FLUX's lean blocks have in common: modulated streams, rotary tables, the attention."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import comfy.ldm.flux.layers as layers
import comfy.ldm.flux.math as flux_math
import torch

from ...denoiser.attention_half import AttendFn
from ...denoiser.attention_part import Heads, Part
from ...denoiser.cuts import DenoiserPlan
from ...denoiser.rows import Columns, Projection, RowsFn, Shift
from ...denoiser.stream import Factors, Stream
from ..base.options import within_groups
from .block import BlockSettings
from .heads import RopeFn, rotation
from .replaced import InPlace, OnHandover


class Modulated(NamedTuple):
    """One stream of a block, and what modulates it there.

    tokens: [B, T, D], written over.
    factors: shift, scale and gate, [B or 1, 1, D].
    """

    tokens: torch.Tensor
    norm: Any
    factors: Any

    def of(self, sample: int, norm: RowsFn) -> Stream:
        """The stream of one sample; norm: fetched."""
        source, factors = self.tokens[sample], self.factors
        shift = Shift(1 + _of(factors.scale, sample), _of(factors.shift, sample))
        run = Factors(0, source.shape[0], shift, _of(factors.gate, sample))
        return Stream(source, source, norm, [run], is_fused=False)


def _of(factors: torch.Tensor, sample: int) -> torch.Tensor:
    return factors[sample if len(factors) > 1 else 0, 0]


def _is_by_token(vec: Any) -> bool:
    """True where tokens are modulated apart. What modulates is not computed for the answer."""
    if isinstance(vec, torch.Tensor):
        return vec.ndim == 3 and vec.shape[1] != 1
    if isinstance(vec, layers.ModulationOut):
        return vec.shift.ndim != 3 or vec.shift.shape[1] != 1
    return any(map(_is_by_token, vec))


class LeanFlux(InPlace):
    """What the parts have in common."""

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.settings = settings

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        if not self.is_untouched():
            return "another node changed a block"
        if given.get("pe", 0) is None:
            return "the request has no positions"
        if _is_by_token(given["vec"]):
            return "each token has its own modulation"
        return super().why_not(given)

    def is_untouched(self) -> bool:
        raise NotImplementedError

    def modulations(self, vec: Any) -> list[Any]:
        raise NotImplementedError

    def plan(self, streams: list[torch.Tensor], options: Mapping[str, Any]) -> DenoiserPlan:
        tokens = sum(stream.shape[1] for stream in streams)
        first = streams[0]
        return self.settings.plan_for(first.shape[0], (tokens,), first.device, options)

    @property
    def heads(self) -> Heads:
        sizes = self.settings.sizes
        return Heads(sizes.heads, sizes.heads, sizes.head_dim)

    def part(
        self,
        stream: Stream,
        qkv: Projection,
        norms: Any,
        rope: RopeFn,
        out: Callable[[torch.Tensor, int], torch.Tensor],
        until: ExitStack,
        plan: DenoiserPlan,
    ) -> Part:
        """A stream of one sample in the attention; norms: of the heads of q and k."""
        sizes = self.settings.sizes
        rotate = rotation(
            rope,
            (norms.query_norm, norms.key_norm),
            sizes.head_dim,
            stream.source,
            until,
            plan,
            is_fused=False,
        )
        query, key, value = (Columns(qkv, index * sizes.dim) for index in range(3))
        return Part(
            stream.source, stream.modulated, query, key, value, rotate, out=out, add=stream.add
        )


def rope_of(pe: torch.Tensor, sample: int, first: int = 0) -> RopeFn:
    """The rotary table of tokens of a part that begins at token `first`."""
    table = pe[sample if len(pe) > 1 else 0].movedim(0, 1)[None]  # [1, T, 1, C / 2, 2, 2]
    return lambda start, stop: table[:, first + start : first + stop]


def _attend(
    options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return flux_math.optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=None, transformer_options=options
    )


def attend_of(options: dict[str, Any], *, is_grouped: bool) -> AttendFn:
    return functools.partial(_attend, within_groups(options) if is_grouped else options)
