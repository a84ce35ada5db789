"""FLUX's blocks in pieces: two streams joined in one attention, or one with both halves at once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import comfy.ldm.flux.layers as layers
import torch

from ...denoiser.attention_half import add_joint_attention
from ...denoiser.cuts import DenoiserPlan, chunks
from ...denoiser.mlp import Hidden, add_mlp
from ...denoiser.parallel import add_parallel
from ...denoiser.rows import Columns, Projection, clamp_fp16_
from ..base.fetch import fetch_layer_norm
from .activations import activation_of, feed_forward_of, is_stock_feed_forward
from .flux_parts import LeanFlux, Modulated, attend_of, rope_of
from .heads import turning
from .projections import cut_projection
from .replaced import is_stock


class LeanDouble(LeanFlux):
    """A DoubleStreamBlock in pieces: the text and the picture, joined in the attention."""

    STREAMS = ("img", "txt")
    KNOWN = ("vec", "pe", "transformer_options")

    def is_untouched(self) -> bool:
        (block,) = self.stock
        return (
            is_stock(block, layers.DoubleStreamBlock)
            and all(is_stock(a.norm, layers.QKNorm) for a in (block.img_attn, block.txt_attn))
            and all(map(is_stock_feed_forward, (block.img_mlp, block.txt_mlp)))
        )

    def modulations(self, vec: Any) -> list[Any]:
        """Of the picture's attention and feed-forward, then of the text's."""
        (block,) = self.stock
        if not block.modulation:
            return [modulation for pair in vec for modulation in pair]
        return [*block.img_mod(vec), *block.txt_mod(vec)]

    def run(self, *, img, txt, vec, pe, transformer_options=None, **_):
        (block,) = self.stock
        options = transformer_options or {}
        plan = self.plan([txt, img], options)
        img_1, img_2, txt_1, txt_2 = self.modulations(vec)
        of_text = (Modulated(txt, block.txt_norm1, txt_1), block.txt_attn)
        of_picture = (Modulated(img, block.img_norm1, img_1), block.img_attn)
        self._attention([of_text, of_picture], pe, options, plan)
        _feed_forward(Modulated(img, block.img_norm2, img_2), block.img_mlp, plan)
        _feed_forward(Modulated(txt, block.txt_norm2, txt_2), block.txt_mlp, plan)
        return img, clamp_fp16_(txt)

    def _attention(
        self,
        streams: list[tuple[Modulated, Any]],
        pe: torch.Tensor,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        with ExitStack() as until:
            fetched = [
                (
                    fetch_layer_norm(stream.norm, stream.tokens, until),
                    cut_projection(attention.qkv, stream.tokens, until, plan),
                    cut_projection(attention.proj, stream.tokens, until, plan),
                )
                for stream, attention in streams
            ]
            is_grouped = not any(qkv.is_whole for _, qkv, _ in fetched)
            attend = attend_of(options, is_grouped=is_grouped)
            for sample in range(streams[0][0].tokens.shape[0]):
                parts, first = [], 0
                for (stream, attention), (norm, qkv, out) in zip(streams, fetched, strict=True):
                    parts.append(
                        self.part(
                            stream.of(sample, norm),
                            qkv,
                            attention.norm,
                            rope_of(pe, sample, first),
                            lambda attended, start, out=out: out.own(attended),
                            until,
                            plan,
                        )
                    )
                    first += stream.tokens.shape[1]
                add_joint_attention(parts, attend=attend, heads=self.heads, plan=plan)


def _feed_forward(stream: Modulated, mlp: Any, plan: DenoiserPlan) -> None:
    feed_forward = feed_forward_of(mlp)
    assert feed_forward is not None
    with ExitStack() as until:
        hidden, out = feed_forward.fetched(stream.tokens, until, plan)
        norm = fetch_layer_norm(stream.norm, stream.tokens, until)
        streams = (stream.of(sample, norm) for sample in range(stream.tokens.shape[0]))
        add_mlp(streams, hidden=hidden, out=out, plan=plan)


class LeanSingle(LeanFlux):
    """A SingleStreamBlock in pieces: its feed-forward is computed where it joins the attention."""

    STREAMS = ("x",)
    KNOWN = ("vec", "pe", "transformer_options")

    def is_untouched(self) -> bool:
        (block,) = self.stock
        return (
            is_stock(block, layers.SingleStreamBlock)
            and is_stock(block.norm, layers.QKNorm)
            and is_stock(block.mlp_act, type(block.mlp_act))
        )

    def modulations(self, vec: Any) -> list[Any]:
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
        plan = self.plan([x], options).parallel
        assert plan is not None  # its sizes say that there are such blocks
        stream = Modulated(x, block.pre_norm, *self.modulations(vec))
        with ExitStack() as until:
            first = cut_projection(block.linear1, x, until, plan)
            last = cut_projection(block.linear2, x, until, plan)
            hidden = self._hidden(first)
            held = hidden if plan.holds_hidden and first.is_whole else None
            norm = fetch_layer_norm(block.pre_norm, x, until)
            attend = attend_of(options, is_grouped=not first.is_whole)
            for sample in range(x.shape[0]):
                of_sample, rope = stream.of(sample, norm), rope_of(pe, sample)

                def out(
                    attended: torch.Tensor,
                    start: int,
                    modulated: Callable[[int, int], torch.Tensor] = of_sample.modulated,
                ) -> torch.Tensor:
                    if held is not None:
                        return last.own(attended)
                    count, dim = attended.shape
                    whole = attended.new_empty(count, dim + hidden.width)
                    whole[:, :dim] = attended
                    del attended  # before the rows of the feed-forward
                    hidden.write(modulated(start, start + count), whole[:, dim:], plan)
                    return last.own(whole)

                part = self.part(of_sample, first, block.norm, rope, out, until, plan)
                turn = turning(rope, block.norm.query_norm, part.rotate, x, until)
                add_parallel(
                    part, turn=turn, attend=attend, heads=self.heads, plan=plan, hidden=held
                )
        return clamp_fp16_(x)


class LeanLast(LeanFlux):
    """The last layer in chunks of tokens.

    The host gives it no options of the request. Whatever they ask, a chunk is little beside what a
    block holds.
    """

    STREAMS = ("x",)
    KNOWN = ("vec",)

    def is_untouched(self) -> bool:
        return is_stock(self.stock[0], type(self.stock[0]))

    def modulations(self, vec: Any) -> list[Any]:
        (layer,) = self.stock
        if isinstance(vec, torch.Tensor):
            made = layer.adaLN_modulation(vec[:, None, :] if vec.ndim == 2 else vec)
            vec = made.chunk(2, dim=-1)
        shift, scale = vec  # Chroma's come as they are
        return [layers.ModulationOut(shift, scale, scale)]

    def run(self, *, x, vec, **_):
        (layer,) = self.stock
        stream = Modulated(x, layer.norm_final, *self.modulations(vec))
        plan = self.plan([x], {})
        with ExitStack() as until:
            norm = fetch_layer_norm(layer.norm_final, x, until)
            linear = cut_projection(layer.linear, x, until, plan)
            made = x.new_empty(*x.shape[:2], layer.linear.out_features)
            for sample in range(x.shape[0]):
                modulated = stream.of(sample, norm).modulated
                for start, stop in chunks(x.shape[1], plan.chunk_tokens):
                    made[sample, start:stop] = linear(modulated(start, stop))
        return made
