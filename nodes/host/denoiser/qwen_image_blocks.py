"""Qwen-Image's blocks in pieces: the text and the picture, joined in one attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import comfy.ldm.qwen_image.model as qwen
import torch
from torch import nn

from ...denoiser.attention_half import add_joint_attention
from ...denoiser.attention_part import Heads, Part
from ...denoiser.cuts import DenoiserPlan, chunks
from ...denoiser.mlp import Hidden, add_mlp
from ...denoiser.rows import Columns, Shift
from ...denoiser.stream import Factors, Stream
from ..base.fetch import fetch_layer_norm
from ..base.options import within_groups
from .block import BlockSettings
from .heads import rotation
from .projections import cut_projection
from .replaced import ONE_TIME, IntoNew, OnHandover, is_stock


def layers_of(mlp: Any) -> tuple[Any, Any]:
    """Of a feed-forward: the first with its GELU, and the last."""
    first, _, last = mlp.get_submodule("net")
    return first, last


class _Side(NamedTuple):
    """The picture's or the text's half of a block.

    source, target: [B, T, D].
    factors: shift, scale and gate of the attention and of the feed-forward, [B or 2B, 6 D]; the
        second half of 2B for tokens from `split` on.
    is_fused: gates of the attention and of the feed-forward, see Stream.
    """

    source: torch.Tensor
    target: torch.Tensor
    norms: tuple[Any, Any]
    factors: torch.Tensor
    split: int | None
    is_fused: tuple[bool, bool]
    layers: tuple[Any, Any, Any]
    head_norms: tuple[Any, Any]
    out: Any
    mlp: Any

    def stream(self, sample: int, half: int, norm: Any) -> Stream:
        """Of one sample; in the feed-forward (half 1) the target alone."""
        source = (self.source, self.target)[half][sample]
        batch, tokens = self.source.shape[:2]
        begins = [0, tokens] if self.split is None else [0, min(self.split, tokens), tokens]
        runs = []
        for index, (first, last) in enumerate(itertools.pairwise(begins)):
            of_half = self.factors[sample + index * batch].chunk(2)[half]
            shift, scale, gate = of_half.chunk(3)
            runs.append(Factors(first, last, Shift(1 + scale, shift), gate))
        return Stream(source, self.target[sample], norm, runs, self.is_fused[half])


def _modulation(layers: Any, temb: torch.Tensor, plan: DenoiserPlan) -> torch.Tensor:
    """Shift, scale and gate of a side's two halves, [B, 6 D]."""
    if not is_stock(layers, nn.Sequential) or not is_stock(layers[0], nn.SiLU):
        return layers(temb)
    silu, linear = layers
    with ExitStack() as until:
        return cut_projection(linear, temb, until, plan)(silu(temb))


class LeanBlock(IntoNew):
    """A block in pieces: the text and the picture, joined in the attention."""

    STREAMS = ("hidden_states", "encoder_hidden_states")
    KNOWN = ("temb", "image_rotary_emb", "timestep_zero_index", "transformer_options")

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.settings = settings

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        (block,) = self.stock
        feed_forwards = (block.img_mlp, block.txt_mlp)
        if not (
            is_stock(block, qwen.QwenImageTransformerBlock)
            and is_stock(block.attn, qwen.Attention)
            and all(is_stock(mlp, qwen.FeedForward) for mlp in feed_forwards)
            and all(is_stock(layers_of(mlp)[0], qwen.GELU) for mlp in feed_forwards)
        ):
            return "another node changed a block"
        if given.get("image_rotary_emb") is None:
            return "the request has no positions"
        is_split = given.get("timestep_zero_index") is not None
        if len(given["temb"]) != len(given["hidden_states"]) * (1 + is_split):
            return ONE_TIME
        return super().why_not(given)

    def run(
        self,
        *,
        hidden_states,
        encoder_hidden_states,
        temb,
        image_rotary_emb,
        timestep_zero_index=None,
        transformer_options=None,
        **_,
    ):
        (block,) = self.stock
        options = transformer_options or {}
        plan = self._plan(hidden_states, encoder_hidden_states, options)
        is_split = timestep_zero_index is not None
        img, txt = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device)
            for x in (hidden_states, encoder_hidden_states)
        )
        attention = block.attn
        picture = _Side(
            hidden_states,
            img,
            (block.img_norm1, block.img_norm2),
            _modulation(block.img_mod, temb, plan),
            timestep_zero_index,
            (not is_split, not is_split),
            (attention.to_q, attention.to_k, attention.to_v),
            (attention.norm_q, attention.norm_k),
            attention.to_out[0],
            block.img_mlp,
        )
        text = _Side(
            encoder_hidden_states,
            txt,
            (block.txt_norm1, block.txt_norm2),
            _modulation(block.txt_mod, temb.chunk(2, dim=0)[0] if is_split else temb, plan),
            None,
            (False, True),
            (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj),
            (attention.norm_added_q, attention.norm_added_k),
            attention.to_add_out,
            block.txt_mlp,
        )
        self._attention([text, picture], image_rotary_emb, options, plan)
        for side in (picture, text):
            _feed_forward(side, plan)
        return txt, img

    def _plan(
        self, img: torch.Tensor, txt: torch.Tensor, options: Mapping[str, Any]
    ) -> DenoiserPlan:
        batch, tokens, _ = img.shape
        return self.settings.plan_for(batch, (tokens + txt.shape[1],), img.device, options)

    def _attention(
        self,
        sides: list[_Side],
        pe: torch.Tensor,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        sizes = self.settings.sizes
        heads = Heads(sizes.heads, sizes.heads, sizes.head_dim)
        with ExitStack() as until:
            fetched, first = [], 0
            for side in sides:
                layers = (*side.layers, side.out)
                *qkv, out = (cut_projection(layer, side.source, until, plan) for layer in layers)
                norm = fetch_layer_norm(side.norms[0], side.source, until)
                rope = _Rope(pe, first)
                norms, like, channels = side.head_norms, side.source, heads.channels
                rotate = rotation(rope, norms, channels, like, until, plan, is_fused=False)
                fetched.append((norm, [Columns(layer) for layer in qkv], out, rope, rotate))
                first += side.source.shape[1]
            is_grouped = not any(q.projection.is_whole for _, qkv, *_ in fetched for q in qkv)
            attend = functools.partial(_attend, within_groups(options) if is_grouped else options)
            for sample in range(sides[0].source.shape[0]):
                parts = []
                for side, (norm, qkv, out, rope, rotate) in zip(sides, fetched, strict=True):
                    rope.sample = sample
                    stream = side.stream(sample, 0, norm)
                    parts.append(
                        Part(
                            stream.source,
                            stream.modulated,
                            qkv[0],
                            qkv[1],
                            qkv[2],
                            rotate,
                            out=functools.partial(lambda out, rows, start: out.own(rows), out),
                            add=stream.add,
                            scratch=stream.target,
                        )
                    )
                add_joint_attention(parts, attend=attend, heads=heads, plan=plan)


class _Rope:
    """The rotary table of a run of a part's tokens, in one sample after the other.

    Args:
        table: of all parts, [1 or B, 1, T, C / 2, 2, 2].
        first: the first token of the part.
    """

    def __init__(self, table: torch.Tensor, first: int) -> None:
        self._table, self._first, self.sample = table, first, 0

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        of_sample = self._table[self.sample if len(self._table) > 1 else 0]
        # [1, T, C / 2, 2, 2] -> [1, T, 1, C / 2, 2, 2]
        return of_sample[:, self._first + start : self._first + stop].unsqueeze(2)


def _attend(
    options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return qwen.optimized_attention_masked(
        q, k, v, q.shape[1], None, transformer_options=options, skip_reshape=True
    )


def _feed_forward(side: _Side, plan: DenoiserPlan) -> None:
    gelu, last = layers_of(side.mlp)
    activation_ = functools.partial(torch.ops.aten.gelu_, approximate=gelu.approximate)
    with ExitStack() as until:
        first = cut_projection(gelu.proj, side.target, until, plan)
        out = cut_projection(last, side.target, until, plan)
        norm = fetch_layer_norm(side.norms[1], side.target, until)
        streams = (side.stream(sample, 1, norm) for sample in range(side.target.shape[0]))
        hidden = Hidden(last.in_features, Columns(first), None, activation_)
        add_mlp(streams, hidden=hidden, out=out, plan=plan)


class LeanLast(IntoNew):
    """The last norm in chunks of tokens."""

    STREAMS = ("x",)
    KNOWN = ("conditioning_embedding",)

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.settings = settings

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        if not is_stock(self.stock[0], qwen.LastLayer):
            return "another node changed a block"
        if len(given["conditioning_embedding"]) != len(given["x"]):
            return ONE_TIME
        return super().why_not(given)

    def run(self, *, x, conditioning_embedding, **_):
        (layer,) = self.stock
        batch, tokens, _ = x.shape
        plan = self.settings.plan_for(batch, (tokens,), x.device)
        made = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        scale, shift = layer.linear(layer.silu(conditioning_embedding)).chunk(2, dim=1)
        with ExitStack() as until:
            norm = fetch_layer_norm(layer.norm, x, until)
            for sample in range(batch):
                factors = Factors(0, tokens, Shift(1 + scale[sample], shift[sample]), None)
                stream = Stream(x[sample], made[sample], norm, [factors])
                for start, stop in chunks(tokens, plan.chunk_tokens):
                    made[sample, start:stop] = stream.modulated(start, stop)
        return made
