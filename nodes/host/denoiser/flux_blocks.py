"""FLUX's blocks in pieces: two streams joined in one attention, or one with both halves at once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import comfy.ldm.flux.layers as layers
import comfy.ldm.flux.math as flux_math
import torch

from ...denoiser.attention_half import AttendFn, add_joint_attention
from ...denoiser.attention_part import Heads, Part
from ...denoiser.cuts import DenoiserPlan, chunks
from ...denoiser.mlp import Hidden, add_mlp
from ...denoiser.parallel import add_parallel
from ...denoiser.rows import Columns, Projection, RowsFn, Shift, clamp_fp16_
from ...denoiser.stream import Factors, Stream
from ..base.fetch import fetch_layer_norm
from ..base.options import within_groups
from .activations import activation_of, feed_forward_of, is_stock_feed_forward
from .block import BlockSettings
from .heads import RopeFn, rotation, turning
from .projections import projection
from .replaced import InPlace, OnHandover, is_stock


class _Modulated(NamedTuple):
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


class _Lean(InPlace):
    """What the parts have in common."""

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.settings = settings

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        if not self._is_untouched():
            return "another node changed a block"
        if given.get("pe", 0) is None:
            return "the request has no positions"
        if _is_by_token(given["vec"]):
            return "each token is modulated by itself"
        return super().why_not(given)

    def _is_untouched(self) -> bool:
        raise NotImplementedError

    def _modulations(self, vec: Any) -> list[Any]:
        raise NotImplementedError

    def _plan(self, streams: list[torch.Tensor], options: Mapping[str, Any]) -> DenoiserPlan:
        tokens = sum(stream.shape[1] for stream in streams)
        first = streams[0]
        return self.settings.plan_for(first.shape[0], (tokens,), first.device, options)

    @property
    def _heads(self) -> Heads:
        sizes = self.settings.sizes
        return Heads(sizes.heads, sizes.heads, sizes.head_dim)

    def _part(
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


def _rope(pe: torch.Tensor, sample: int, first: int = 0) -> RopeFn:
    """The rotary table of tokens of a part that begins at token `first`."""
    table = pe[sample if len(pe) > 1 else 0].movedim(0, 1)[None]  # [1, T, 1, C / 2, 2, 2]
    return lambda start, stop: table[:, first + start : first + stop]


def _attend(
    options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return flux_math.optimized_attention(
        q, k, v, q.shape[1], skip_reshape=True, mask=None, transformer_options=options
    )


def _attend_of(options: dict[str, Any], *, is_grouped: bool) -> AttendFn:
    return functools.partial(_attend, within_groups(options) if is_grouped else options)


class LeanDouble(_Lean):
    """A DoubleStreamBlock in pieces: the text and the picture, joined in the attention."""

    STREAMS = ("img", "txt")
    KNOWN = ("vec", "pe", "transformer_options")

    def _is_untouched(self) -> bool:
        (block,) = self.stock
        return (
            is_stock(block, layers.DoubleStreamBlock)
            and all(is_stock(a.norm, layers.QKNorm) for a in (block.img_attn, block.txt_attn))
            and all(map(is_stock_feed_forward, (block.img_mlp, block.txt_mlp)))
        )

    def _modulations(self, vec: Any) -> list[Any]:
        """Of the picture's attention and feed-forward, then of the text's."""
        (block,) = self.stock
        if not block.modulation:
            return [modulation for pair in vec for modulation in pair]
        return [*block.img_mod(vec), *block.txt_mod(vec)]

    def run(self, *, img, txt, vec, pe, transformer_options=None, **_):
        (block,) = self.stock
        options = transformer_options or {}
        plan = self._plan([txt, img], options)
        img_1, img_2, txt_1, txt_2 = self._modulations(vec)
        of_text = (_Modulated(txt, block.txt_norm1, txt_1), block.txt_attn)
        of_picture = (_Modulated(img, block.img_norm1, img_1), block.img_attn)
        self._attention([of_text, of_picture], pe, options, plan)
        _feed_forward(_Modulated(img, block.img_norm2, img_2), block.img_mlp, plan)
        _feed_forward(_Modulated(txt, block.txt_norm2, txt_2), block.txt_mlp, plan)
        return img, clamp_fp16_(txt)

    def _attention(
        self,
        streams: list[tuple[_Modulated, Any]],
        pe: torch.Tensor,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        with ExitStack() as until:
            fetched = [
                (
                    fetch_layer_norm(stream.norm, stream.tokens, until),
                    projection(attention.qkv, stream.tokens, until),
                    projection(attention.proj, stream.tokens, until),
                )
                for stream, attention in streams
            ]
            is_grouped = not any(qkv.is_whole for _, qkv, _ in fetched)
            attend = _attend_of(options, is_grouped=is_grouped)
            for sample in range(streams[0][0].tokens.shape[0]):
                parts, first = [], 0
                for (stream, attention), (norm, qkv, out) in zip(streams, fetched, strict=True):
                    parts.append(
                        self._part(
                            stream.of(sample, norm),
                            qkv,
                            attention.norm,
                            _rope(pe, sample, first),
                            lambda attended, start, out=out: out.own(attended),
                            until,
                            plan,
                        )
                    )
                    first += stream.tokens.shape[1]
                add_joint_attention(parts, attend=attend, heads=self._heads, plan=plan)


def _feed_forward(stream: _Modulated, mlp: Any, plan: DenoiserPlan) -> None:
    feed_forward = feed_forward_of(mlp)
    assert feed_forward is not None
    with ExitStack() as until:
        hidden, out = feed_forward.fetched(stream.tokens, until)
        norm = fetch_layer_norm(stream.norm, stream.tokens, until)
        for sample in range(stream.tokens.shape[0]):
            of_sample = stream.of(sample, norm)
            add_mlp(
                of_sample.source,
                modulated=of_sample.modulated,
                hidden=hidden,
                out=out,
                add=of_sample.add,
                plan=plan,
            )


class LeanSingle(_Lean):
    """A SingleStreamBlock in pieces: its feed-forward is computed where it joins the attention."""

    STREAMS = ("x",)
    KNOWN = ("vec", "pe", "transformer_options")

    def _is_untouched(self) -> bool:
        (block,) = self.stock
        return (
            is_stock(block, layers.SingleStreamBlock)
            and is_stock(block.norm, layers.QKNorm)
            and is_stock(block.mlp_act, type(block.mlp_act))
        )

    def _modulations(self, vec: Any) -> list[Any]:
        (block,) = self.stock
        return [vec if block.modulation is None else block.modulation(vec)[0]]

    def _hidden(self, first: Projection) -> Hidden:
        """The hidden rows: the columns of the first product that follow q, k and v."""
        (block,) = self.stock
        activation = activation_of(block.mlp_act)
        assert activation is not None
        begin = 3 * self.settings.sizes.dim
        width = block.linear2.in_features - self.settings.sizes.dim
        halves = Columns(first, begin), Columns(first, begin + width)
        if block.yak_mlp:  # it activates the second half
            return Hidden(width, halves[1], halves[0], activation.apply_)
        second = halves[1] if activation.is_gated else None
        return Hidden(width, halves[0], second, activation.apply_)

    def run(self, *, x, vec, pe, transformer_options=None, **_):
        (block,) = self.stock
        options = transformer_options or {}
        plan = self._plan([x], options).parallel
        assert plan is not None  # its sizes say that there are such blocks
        stream = _Modulated(x, block.pre_norm, *self._modulations(vec))
        with ExitStack() as until:
            first = projection(block.linear1, x, until)
            last = projection(block.linear2, x, until)
            hidden = self._hidden(first)
            norm = fetch_layer_norm(block.pre_norm, x, until)
            attend = _attend_of(options, is_grouped=not first.is_whole)
            for sample in range(x.shape[0]):
                of_sample, rope = stream.of(sample, norm), _rope(pe, sample)

                def out(
                    attended: torch.Tensor,
                    start: int,
                    modulated: Callable[[int, int], torch.Tensor] = of_sample.modulated,
                ) -> torch.Tensor:
                    count, dim = attended.shape
                    whole = attended.new_empty(count, dim + hidden.width)
                    whole[:, :dim] = attended
                    del attended  # before the rows of the feed-forward
                    hidden.write(modulated(start, start + count), whole[:, dim:], plan)
                    return last.own(whole)

                part = self._part(of_sample, first, block.norm, rope, out, until, plan)
                turn = turning(rope, block.norm.query_norm, part.rotate, x, until)
                add_parallel(part, turn=turn, attend=attend, heads=self._heads, plan=plan)
        return clamp_fp16_(x)


class LeanLast(_Lean):
    """The last layer in chunks of tokens.

    The host gives it no options of the request. Whatever they ask, a chunk is little beside what a
    block holds.
    """

    STREAMS = ("x",)
    KNOWN = ("vec",)

    def _is_untouched(self) -> bool:
        return is_stock(self.stock[0], type(self.stock[0]))

    def _modulations(self, vec: Any) -> list[Any]:
        (layer,) = self.stock
        if isinstance(vec, torch.Tensor):
            made = layer.adaLN_modulation(vec[:, None, :] if vec.ndim == 2 else vec)
            vec = made.chunk(2, dim=-1)
        shift, scale = vec  # Chroma's come as they are
        return [layers.ModulationOut(shift, scale, scale)]

    def run(self, *, x, vec, **_):
        (layer,) = self.stock
        stream = _Modulated(x, layer.norm_final, *self._modulations(vec))
        plan = self._plan([x], {})
        with ExitStack() as until:
            norm = fetch_layer_norm(layer.norm_final, x, until)
            linear = projection(layer.linear, x, until)
            made = x.new_empty(*x.shape[:2], layer.linear.out_features)
            for sample in range(x.shape[0]):
                modulated = stream.of(sample, norm).modulated
                for start, stop in chunks(x.shape[1], plan.chunk_tokens):
                    made[sample, start:stop] = linear(modulated(start, stop))
        return made
