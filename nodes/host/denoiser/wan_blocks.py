"""Wan's block in pieces: attention to itself, to the text, then the feed-forward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import comfy.ldm.wan.model as wan
import torch
from torch import nn

from ...denoiser.attention_half import AttendFn, add_joint_attention
from ...denoiser.attention_part import Heads, Part
from ...denoiser.cross_attention import add_cross_attention
from ...denoiser.cuts import DenoiserPlan
from ...denoiser.mlp import Hidden, add_mlp
from ...denoiser.rows import Columns, RowsFn, Shift
from ...denoiser.stream import Factors, Stream
from ..base.fetch import fetch_layer_norm, fetch_norm
from ..base.options import within_groups
from .heads import rotation
from .projections import cut_projection
from .replaced import ONE_TIME, is_stock
from .wan_ends import LeanWan, is_by_token, runs_of

ACROSS = (wan.WanT2VCrossAttention, wan.WanI2VCrossAttention)


class LeanBlock(LeanWan):
    """A block in pieces."""

    STREAMS = ("x",)
    KNOWN = ("e", "freqs", "context", "context_img_len", "transformer_options")

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        (block,) = self.stock
        if not (
            is_stock(block, wan.WanAttentionBlock)
            and is_stock(block.self_attn, wan.WanSelfAttention)
            and any(is_stock(block.cross_attn, kind) for kind in ACROSS)
            and is_stock(block.ffn, nn.Sequential)
            and is_stock(block.ffn[1], nn.GELU)
            and block.ffn[1].approximate == "tanh"
        ):
            return "another node changed a block"
        if given["freqs"] is None:
            return "the request has no positions"
        if len(given["e"]) != len(given["x"]):
            return ONE_TIME
        if is_by_token(given["e"], given["x"].shape[1]):
            return "each token has its own modulation"
        patches = (given.get("transformer_options") or {}).get("patches", {})
        if patches.get("attn2_patch"):
            return "another node patches the attention (attn2_patch)"
        return super().why_not(given)

    def run(
        self, *, x, e, freqs, context, context_img_len=257, transformer_options=None, **_
    ) -> torch.Tensor:
        options = transformer_options or {}
        plan = self.plan(x, options)
        factors = self.modulated(x, e if e.ndim == 4 else e.unsqueeze(1))
        target = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._attend_to_itself(x, target, factors, freqs, options, plan)
        self._attend_to_text(target, context, context_img_len, options, plan)
        self._feed_forward(target, factors, plan)
        return target

    @property
    def _heads(self) -> Heads:
        sizes = self.settings.sizes
        return Heads(sizes.heads, sizes.heads, sizes.head_dim)

    def _attend_to_itself(
        self,
        x: torch.Tensor,
        target: torch.Tensor,
        factors: torch.Tensor,
        freqs: torch.Tensor,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        (block,) = self.stock
        attention = block.self_attn
        heads = self._heads
        with ExitStack() as until:
            layers = (attention.q, attention.k, attention.v, attention.o)
            query, key, value, out = (cut_projection(layer, x, until, plan) for layer in layers)
            norms = (fetch_norm(attention.norm_q, x, until), fetch_norm(attention.norm_k, x, until))
            is_grouped = not any(layer.is_whole for layer in (query, key, value))
            norm = fetch_layer_norm(block.norm1, x, until)
            attend = functools.partial(_attend, within_groups(options) if is_grouped else options)
            for sample in range(x.shape[0]):
                stream = _stream(x[sample], target[sample], norm, factors[sample], 0)
                table = freqs[sample : sample + 1] if len(freqs) > 1 else freqs
                part = Part(
                    stream.source,
                    stream.modulated,
                    Columns(query),
                    Columns(key),
                    Columns(value),
                    rotation(
                        functools.partial(_rows_of, table),
                        (None, None),
                        heads.channels,
                        x,
                        until,
                        plan,
                        is_fused=False,
                    ),
                    out=lambda attended, start: out(attended),
                    add=stream.add,
                    scratch=stream.target,
                    norms=norms,
                )
                add_joint_attention([part], attend=attend, heads=heads, plan=plan)

    def _attend_to_text(
        self,
        target: torch.Tensor,
        context: torch.Tensor,
        context_img_len: int | None,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        (block,) = self.stock
        across, heads = block.cross_attn, self._heads
        text, of_picture = context, None
        if isinstance(across, wan.WanI2VCrossAttention):
            picture, text = context[:, :context_img_len], context[:, context_img_len:]
            of_picture = across.norm_k_img(across.k_img(picture)), across.v_img(picture)
        key, value = across.norm_k(across.k(text)), across.v(text)
        with ExitStack() as until:
            query, out = (
                cut_projection(layer, target, until, plan) for layer in (across.q, across.o)
            )
            norm_query = fetch_norm(across.norm_q, target, until)
            norm = fetch_layer_norm(block.norm3, target, until)
            attend: AttendFn = functools.partial(_attend, options)
            for sample in range(target.shape[0]):
                if of_picture is not None:
                    keys, values = (
                        _by_head(rows[sample : sample + 1], heads) for rows in of_picture
                    )
                    attend = _of_both(functools.partial(_attend, options), keys, values)
                tokens = target.shape[1]
                stream = Stream(
                    target[sample], target[sample], norm, [Factors(0, tokens, None, None)]
                )
                add_cross_attention(
                    stream.target,
                    modulated=stream.modulated,
                    query=lambda rows: norm_query(query(rows)),
                    key=key[sample],
                    value=value[sample],
                    attend=attend,
                    out=out,
                    add=stream.add,
                    heads=heads,
                    plan=plan,
                )

    def _feed_forward(
        self, target: torch.Tensor, factors: torch.Tensor, plan: DenoiserPlan
    ) -> None:
        (block,) = self.stock
        first, gelu, last = block.ffn
        activation_ = functools.partial(torch.ops.aten.gelu_, approximate=gelu.approximate)
        with ExitStack() as until:
            inner = cut_projection(first, target, until, plan)
            out = cut_projection(last, target, until, plan)
            norm = fetch_layer_norm(block.norm2, target, until)
            streams = (
                _stream(target[sample], target[sample], norm, factors[sample], 3)
                for sample in range(target.shape[0])
            )
            hidden = Hidden(last.in_features, Columns(inner), None, activation_)
            add_mlp(streams, hidden=hidden, out=out, plan=plan)


def _stream(
    source: torch.Tensor, target: torch.Tensor, norm: RowsFn, factors: torch.Tensor, first: int
) -> Stream:
    """Of one sample, modulated by shift, scale and gate from that factor on; factors [N, 6, D]."""
    runs = [
        Factors(begin, end, Shift(1 + f[first + 1], f[first]), f[first + 2])
        for begin, end, f in runs_of(factors, source.shape[0])
    ]
    return Stream(source, target, norm, runs)


def _rows_of(table: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The rotary table of a run of tokens, of that of all, [1, T, 1, C / 2, 2, 2]."""
    return table[:, start:stop]


def _by_head(rows: torch.Tensor, heads: Heads) -> torch.Tensor:
    """[1, S, H * C] -> [1, H, S, C]."""
    return rows.unflatten(2, (-1, heads.channels)).transpose(1, 2)


def _attend(
    options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return wan.optimized_attention(
        q, k, v, heads=q.shape[1], skip_reshape=True, transformer_options=options
    )


def _of_both(attend: AttendFn, key: torch.Tensor, value: torch.Tensor) -> AttendFn:
    """What attends to the text, plus what attends to these keys of a picture."""

    def of_both(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # In a new tensor: an override of the attention may hold what it returned.
        return attend(q, key, value) + attend(q, k, v)

    return of_both
