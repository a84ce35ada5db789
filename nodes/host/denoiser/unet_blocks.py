"""A transformer block of a U-Net in pieces: attention, attention to the text, GEGLU."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention as attention
import torch
from torch import nn

from ...denoiser.attention_half import AttendFn, add_joint_attention
from ...denoiser.attention_part import Heads, Part
from ...denoiser.cross_attention import add_cross_attention
from ...denoiser.cuts import DenoiserPlan
from ...denoiser.mlp import Hidden, add_mlp
from ...denoiser.rows import Columns
from ...denoiser.sizes import TransformerSizes
from ...denoiser.stream import Factors, Stream
from ..base.fetch import fetch_layer_norm
from ..base.options import within_groups
from .block import BlockSettings
from .projections import has_whole, projection
from .replaced import IntoNew, OnHandover, is_stock

# What the host's block holds of a token at its peak, in streams, beside the one that it was given:
# that with the attention added, normed, and GEGLU's product, GELU and product of the two.
STOCK_STREAMS = 18
PATCHES = ("middle_patch", "attn2_patch", "attn2_output_patch")


def is_known_block(block: Any) -> bool:
    """True for a block that attends to itself, then to a text, and has a GEGLU."""
    return (
        type(block) is attention.BasicTransformerBlock
        and not block.ff_in
        and block.is_res
        and not block.disable_self_attn
        and block.attn2 is not None
        and not block.switch_temporal_ca_to_sa
        # One of another node's clone in use is looked at in each call.
        and (not _is_own(block.ff) or type(_layers(block.ff)[0]) is attention.GEGLU)
    )


def _is_own(feed_forward: Any) -> bool:
    return type(feed_forward) is attention.FeedForward


def _layers(feed_forward: Any) -> tuple[Any, Any, Any]:
    """GEGLU, dropout and the last layer."""
    first, dropout, last = feed_forward.get_submodule("net")
    return first, dropout, last


def sizes_of(blocks: list[Any], *, patch: int, channels: int) -> TransformerSizes:
    """The sizes of the first of these blocks; whether any of them is whole.

    Args:
        patch: latent rows and columns of a token of the first.
        channels: of the latent.
    """
    first = blocks[0]
    dim = first.n_heads * first.d_head
    to_k = getattr(first.attn2, "to_k", None)
    return TransformerSizes(
        dim=dim,
        heads=first.n_heads,
        kv_heads=first.n_heads,
        head_dim=first.d_head,
        # The host's has four times the stream's width.
        ffn_dim=_layers(first.ff)[2].in_features if _is_own(first.ff) else 4 * dim,
        layers=len(blocks),
        refiner_layers=0,
        cap_dim=getattr(to_k, "in_features", 0),
        patch=patch,
        channels=channels,
        pad_multiple=1,
        is_whole=has_whole(blocks),
        stock_elements=STOCK_STREAMS * dim,
    )


def _attend(
    layer: Any, options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    # [1, H, T, C] -> [1, T, H * C], views: the host splits the heads itself
    rows = (heads.movedim(1, 2).flatten(2) for heads in (q, k, v))
    return attention.optimized_attention(
        *rows, q.shape[1], attn_precision=layer.attn_precision, transformer_options=options
    )


def _attend_of(layer: Any, options: dict[str, Any], *, is_grouped: bool) -> AttendFn:
    options = within_groups(options) if is_grouped else options
    return functools.partial(_attend, layer, options)


def _no_rotation(query: torch.Tensor | None, key: torch.Tensor | None, start: int) -> None:
    """The U-Nets' tokens have no positions of their own."""


class _Block(attention.BasicTransformerBlock):
    """So that other packs, which look for blocks by their class, find the part."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class LeanTransformer(IntoNew, _Block):
    """A BasicTransformerBlock in pieces, into one new stream."""

    STREAMS = ("x",)
    KNOWN = ("context", "transformer_options")

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        sizes = sizes_of([block], patch=1, channels=1)
        self.settings = replace(settings, sizes=sizes)

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        if not self._is_untouched():
            return "another node changed a block"
        x, context = given["x"], given.get("context")
        if not isinstance(context, torch.Tensor) or context.shape[0] != x.shape[0]:
            return "the request has no text of its own for each picture"
        options = given.get("transformer_options") or {}
        for kind in PATCHES:
            if options.get("patches", {}).get(kind):
                return f"another node patches the attention ({kind})"
        if _replacement(options, "attn1") is not None:
            return "another node replaces the attention (attn1)"
        return super().why_not(given)

    def _is_untouched(self) -> bool:
        (block,) = self.stock
        of_classes = (
            is_stock(block, attention.BasicTransformerBlock)
            and is_stock(block.attn1, attention.CrossAttention)
            and is_stock(block.attn2, attention.CrossAttention)
            and is_stock(block.ff, attention.FeedForward)
        )
        if not of_classes:  # others may lack the layers
            return False
        outs = (block.attn1.to_out, block.attn2.to_out)
        nets = (*outs, block.ff.get_submodule("net"))
        if not all(is_stock(net, nn.Sequential) for net in nets) or [*map(len, nets)] != [2, 2, 3]:
            return False
        first, dropout, last = _layers(block.ff)
        return (
            is_stock(first, attention.GEGLU)
            and hasattr(last, "in_features")  # quantised ones are no nn.Linear
            and all(_is_idle(layer) for layer in (dropout, *(out[1] for out in outs)))
        )

    def run(self, *, x, context, transformer_options=None, **_):
        options = transformer_options or {}
        target = torch.empty_like(x)
        plan = self.settings.plan(x, options)
        # A function for each third: its end frees the copies of its weights.
        self._self_attention(x, target, options, plan)
        replaced = _replacement(options, "attn2")
        if replaced is None:
            self._cross_attention(target, context, options, plan)
        else:
            self._replaced_attention(target, context, options, replaced)
        self._feed_forward(target, plan)
        return target

    @property
    def _heads(self) -> Heads:
        sizes = self.settings.sizes
        return Heads(sizes.heads, sizes.heads, sizes.head_dim)

    def _self_attention(
        self, x: torch.Tensor, target: torch.Tensor, options: dict[str, Any], plan: DenoiserPlan
    ) -> None:
        (block,) = self.stock
        layer = block.attn1
        with ExitStack() as until:
            layers = (layer.to_q, layer.to_k, layer.to_v)
            q, k, v = (projection(each, x, until) for each in layers)
            out = projection(layer.to_out[0], x, until)
            norm = fetch_layer_norm(block.norm1, x, until)
            is_grouped = not any(each.is_whole for each in (q, k, v))
            attend = _attend_of(layer, options, is_grouped=is_grouped)
            for sample in range(x.shape[0]):
                stream = _stream(x[sample], target[sample], norm)
                part = Part(
                    stream.source,
                    stream.modulated,
                    Columns(q),
                    Columns(k),
                    Columns(v),
                    _no_rotation,
                    out=lambda attended, start: out.own(attended),
                    add=stream.add,
                    scratch=stream.target,
                )
                add_joint_attention([part], attend=attend, heads=self._heads, plan=plan)

    def _cross_attention(
        self,
        target: torch.Tensor,
        context: torch.Tensor,
        options: dict[str, Any],
        plan: DenoiserPlan,
    ) -> None:
        (block,) = self.stock
        layer = block.attn2
        with ExitStack() as until:
            query = projection(layer.to_q, target, until)
            key, value = layer.to_k(context), layer.to_v(context)  # of the text, whole
            out = projection(layer.to_out[0], target, until)
            norm = fetch_layer_norm(block.norm2, target, until)
            attend = _attend_of(layer, options, is_grouped=False)
            for sample in range(target.shape[0]):
                stream = _stream(target[sample], target[sample], norm)
                add_cross_attention(
                    stream.source,
                    modulated=stream.modulated,
                    query=query,
                    key=key[sample],
                    value=value[sample],
                    attend=attend,
                    out=out.own,
                    add=stream.add,
                    heads=self._heads,
                    plan=plan,
                )

    def _replaced_attention(
        self,
        target: torch.Tensor,
        context: torch.Tensor,
        options: dict[str, Any],
        replaced: Callable[..., torch.Tensor],
    ) -> None:
        """What an IP-Adapter makes of the whole batch: at most four streams beside the target."""
        (block,) = self.stock
        layer = block.attn2
        own = ("patches", "patches_replace")
        more = {key: value for key, value in options.items() if key not in own}
        more |= {"n_heads": block.n_heads, "dim_head": block.d_head}
        more["attn_precision"] = block.attn_precision
        with ExitStack() as until:
            query = layer.to_q(fetch_layer_norm(block.norm2, target, until)(target))
        attended = replaced(query, layer.to_k(context), layer.to_v(context), more)
        del query  # before the output projection allocates
        target.add_(layer.to_out(attended))

    def _feed_forward(self, target: torch.Tensor, plan: DenoiserPlan) -> None:
        (block,) = self.stock
        gated, _, last = _layers(block.ff)
        with ExitStack() as until:
            first, out = (projection(each, target, until) for each in (gated.proj, last))
            norm = fetch_layer_norm(block.norm3, target, until)
            width = last.in_features
            hidden = Hidden(width, Columns(first, width), Columns(first), _gelu_)
            streams = (
                _stream(target[sample], target[sample], norm) for sample in range(target.shape[0])
            )
            add_mlp(streams, hidden=hidden, out=out, plan=plan)


def _replacement(options: Mapping[str, Any], kind: str) -> Callable[..., torch.Tensor] | None:
    """What another node has put in place of an attention of the block that runs."""
    place = options.get("block")
    block = None if place is None else (*place[:2], options.get("block_index", 0))
    replaced = options.get("patches_replace", {}).get(kind, {})
    return replaced.get(block, replaced.get(place))


def _gelu_(rows: torch.Tensor) -> None:
    """GELU of rows [T, C] in place, with the bits that the host's half of a product gets.

    The CPU has a kernel of another library for rows that are contiguous.
    """
    for part in rows.chunk(2, dim=1) if rows.device.type == "cpu" else (rows,):
        torch.ops.aten.gelu_(part)


def _stream(source: torch.Tensor, target: torch.Tensor, norm: Any) -> Stream:
    return Stream(source, target, norm, [Factors(0, source.shape[0], None, None)])


def _is_idle(layer: Any) -> bool:
    """True for a dropout that drops nothing."""
    return is_stock(layer, nn.Dropout) and (layer.p == 0 or not layer.training)
