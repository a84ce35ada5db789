"""Runs the host's Z-Image block in chunks, from the outside.

`run_block` reads the block's own layers and never changes the block. `LeanBlock` replaces a block
in a patched model. Its layers are the block's own, so weights, LoRA and offload find them by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import comfy.ldm.lumina.model as lumina
import comfy.model_management
import torch
import torch.utils.checkpoint

from ...denoiser.attention_half import add_attention
from ...denoiser.attention_part import Heads
from ...denoiser.cuts import DenoiserPlan
from ...denoiser.feed_forward_half import add_feed_forward
from ...denoiser.plan import DEFAULT, FILL_TOKENS, DenoiserChoice, fill_tokens, plan_for
from ...denoiser.rows import Modulation
from ...denoiser.sizes import TransformerSizes
from ..base.device import multiprocessors
from ..base.fetch import fetch_norm
from ..base.options import FIT, OPTIONS_KEY, asked_groups
from .heads import RopeFn, attend_of, rotation, views_of
from .projections import projection
from .replaced import Replaced, eager, is_stock

EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class BlockSettings:
    """How the blocks of a model are cut.

    sizes: of the transformer.
    choice: what was chosen; Attention Slice may ask for more groups, Fit to VRAM for less memory.
    """

    sizes: TransformerSizes
    choice: DenoiserChoice = DEFAULT

    @eager  # else the sizes of one call become guards of the graph
    def plan(self, stream: torch.Tensor, transformer_options: dict[str, Any]) -> DenoiserPlan:
        """The plan for blocks that get such a stream, [B, T, D]."""
        batch, tokens, _ = stream.shape
        return self.plan_for(batch, (tokens,), stream.device, transformer_options)

    def plan_for(
        self,
        batch: int,
        lengths: tuple[int, ...],
        device: torch.device,
        transformer_options: Mapping[str, Any] = EMPTY,
    ) -> DenoiserPlan:
        """The plan for blocks of that many samples and tokens; see nodes/denoiser/plan.py."""
        choice = self.choice.at_least(asked_groups(transformer_options, self.sizes.kv_heads))
        asked = transformer_options.get(OPTIONS_KEY, {}).get(FIT)
        if asked is not None:
            choice = choice.and_also(asked)
        return plan_for(self.sizes, batch, lengths, choice, fill=fill_on(device, self.sizes))


def fill_on(device: torch.device, sizes: TransformerSizes) -> int:
    """Rows with which a product fills the card; a constant where that is not known."""
    count = multiprocessors(device)
    return FILL_TOKENS if count is None else fill_tokens(count, sizes.dim)


def is_known_block(block: Any) -> bool:
    """True for the host's own block class with its own forward."""
    return type(block) is lumina.JointTransformerBlock


def is_untouched(block: Any, kind: type = lumina.JointTransformerBlock) -> bool:
    """True for a block without hooks and without replaced forwards, in its parts as well.

    Args:
        kind: the class of the host that it should have.
    """
    if type(block) is LeanBlock:
        if "forward" in vars(block):
            return False
        (block,) = block.stock
    return (
        is_stock(block, kind)
        and is_stock(block.attention, lumina.JointAttention)
        and is_stock(block.feed_forward, lumina.FeedForward)
    )


@eager
def run_block(
    block: Any,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    rope: RopeFn,
    adaln_input: torch.Tensor | None,
    timestep_zero_index: Sequence[tuple[int, int]] | None = None,
    transformer_options: dict[str, Any],
    plan: DenoiserPlan,
) -> None:
    """Runs the block sample by sample: target = block(source).

    Args:
        block: a JointTransformerBlock, or a LeanBlock of one.
        source: residual stream, [B, T, D], float; read only unless it is `target`.
        target: [B, T, D], float; may be `source`.
        rope: rotary table of a run of tokens.
        adaln_input: timestep embedding, [B, 256 or 1024], or [2B, ...] with timestep_zero_index.
        timestep_zero_index: runs of tokens that take the second half of the batch's modulation.
        transformer_options: the request's, handed to the attention.
        plan: how to cut.
    """
    batch, tokens, _ = source.shape
    scale, gate, feed_scale, feed_gate = _modulation(
        block, adaln_input, batch, tokens, timestep_zero_index
    )
    # A function for each half: its end frees the copies of the half's weights.
    _attention_half(block, source, target, rope, scale, gate, transformer_options, plan)
    _feed_forward_half(block, target, feed_scale, feed_gate, plan)


def _attention_half(
    block: Any,
    source: torch.Tensor,
    target: torch.Tensor,
    rope: RopeFn,
    scale: list[Modulation],
    gate: list[Modulation],
    transformer_options: dict[str, Any],
    plan: DenoiserPlan,
) -> None:
    attention = block.attention
    heads = Heads(attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim)
    with ExitStack() as until:
        qkv, out = (projection(layer, source, until) for layer in (attention.qkv, attention.out))
        norm_in = fetch_norm(block.attention_norm1, source, until)
        norm_out = fetch_norm(block.attention_norm2, source, until)
        norms = attention.q_norm, attention.k_norm
        rotate = rotation(rope, norms, attention.head_dim, source, until, plan)
        for sample in range(source.shape[0]):
            add_attention(
                source[sample],
                target[sample],
                norm_in=norm_in,
                scale=scale[sample],
                qkv=qkv,
                rotate=rotate,
                attend=attend_of(attention, transformer_options, is_grouped=not qkv.is_whole),
                out=out,
                norm_out=norm_out,
                gate=gate[sample],
                heads=heads,
                plan=plan,
                scratch=None if target is source else target[sample],
            )


def _feed_forward_half(
    block: Any,
    target: torch.Tensor,
    scale: list[Modulation],
    gate: list[Modulation],
    plan: DenoiserPlan,
) -> None:
    layers = block.feed_forward
    with ExitStack() as until:
        w1, w2, w3 = (projection(w, target, until) for w in (layers.w1, layers.w2, layers.w3))
        norm_in = fetch_norm(block.ffn_norm1, target, until)
        norm_out = fetch_norm(block.ffn_norm2, target, until)
        for sample in range(target.shape[0]):
            add_feed_forward(
                target[sample],
                target[sample],
                norm_in=norm_in,
                scale=scale[sample],
                w1=w1,
                w2=w2,
                w3=w3,
                norm_out=norm_out,
                gate=gate[sample],
                plan=plan,
                is_clamped=block.modulation,
            )


class LeanBlock(Replaced):
    """Replaces a block of the host under the host's own forward.

    Sampling: `run_block` into a new tensor. With gradients: the block itself under
    torch.utils.checkpoint, so that its activations are computed again in the backward pass.
    Calls that it does not know (a mask, other arguments, a block that another node changed) go to
    the block as they are.
    """

    def __init__(self, block: Any, settings: BlockSettings) -> None:
        super().__init__(block)
        for name in ("layer_id", "dim", "head_dim", "modulation"):
            setattr(self, name, getattr(block, name))
        self.settings = settings

    def forward(self, x, x_mask, freqs_cis, adaln_input=None, *args, **kwargs):
        (block,) = self.stock
        known = {"timestep_zero_index", "transformer_options"}
        if torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, adaln_input, *block.parameters())
        ):
            return torch.utils.checkpoint.checkpoint(
                block, x, x_mask, freqs_cis, adaln_input, *args, use_reentrant=False, **kwargs
            )
        is_unknown = x_mask is not None or args or set(kwargs) - known
        if is_unknown or comfy.model_management.in_training or not is_untouched(block):
            return block(x, x_mask, freqs_cis, adaln_input, *args, **kwargs)
        options = kwargs.get("transformer_options", {})
        target = torch.empty_like(x)
        run_block(
            block,
            x,
            target,
            rope=views_of(freqs_cis),
            adaln_input=adaln_input,
            timestep_zero_index=kwargs.get("timestep_zero_index"),
            transformer_options=options,
            plan=self.settings.plan(x, options),
        )
        return target


def _modulation(
    block: Any,
    adaln_input: torch.Tensor | None,
    batch: int,
    tokens: int,
    timestep_zero_index: Sequence[tuple[int, int]] | None,
) -> list[list[Modulation]]:
    """By sample: scale and gate of the attention, scale and gate of the feed-forward."""
    if not block.modulation:
        return [[Modulation(())] * batch] * 4
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(adaln_input).chunk(4, dim=1)
    factors = (1 + scale_msa, gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh())
    runs = [(0, tokens, 0)]
    if timestep_zero_index is not None:
        others = lumina.invert_slices(timestep_zero_index, tokens)
        runs = sorted([(*r, batch) for r in timestep_zero_index] + [(*r, 0) for r in others])
    return [
        [
            Modulation([(first, last, f[sample + half]) for first, last, half in runs])
            for sample in range(batch)
        ]
        for f in factors
    ]
