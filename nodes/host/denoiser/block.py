"""The host's Z-Image block, computed in chunks from the outside.

`run_block` reads the block's own layers and never changes the block. `LeanBlock` stands in for a
block in a patched model; its layers are the block's own, so weights, LoRA and offload find them by
name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.ldm.lumina.model as lumina
import comfy.model_management
import comfy.ops
import comfy.quant_ops
import torch
import torch.utils.checkpoint
from torch import nn

from ..base import fetch
from ..base.options import head_groups, within_groups

# Hosts from 0.28 on fuse norm and rotary embedding; the older ones call them one after the other.
IS_FUSED = "rms_rope" in lumina.JointAttention.forward.__code__.co_names

Segments = Sequence[tuple[int, int, torch.Tensor]]
# Rotary table of the tokens start:stop of a sample, [1, stop - start, 1, head_dim / 2, 2, 2].
RopeFn = Callable[[int, int], torch.Tensor]


class Kernels(Protocol):
    """The pure kernels, handed in by the node file: this room does not import them."""

    add_attention: Callable[..., None]
    add_feed_forward: Callable[..., None]
    projection: Callable[..., Any]
    modulation: Callable[[Segments], Any]
    heads: Callable[..., Any]
    chunks: Callable[[int, int], Iterator[tuple[int, int]]]


@dataclass(frozen=True)
class BlockSettings:
    """How a block is cut.

    chunk_tokens: rows at a time, by the number of tokens of a sample and the groups.
    groups: into how many groups the heads are cut at least; Attention Slice may ask for more.
    """

    kernels: Kernels
    chunk_tokens: Callable[[int, int], int]
    groups: int

    def runs(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Cuts that many rows into chunks: (start, stop)."""
        return self.kernels.chunks(tokens, self.chunk_tokens(tokens, self.groups))


def is_known_block(block: nn.Module) -> bool:
    """True for the host's own block class with its own forward."""
    return type(block) is lumina.JointTransformerBlock


def is_untouched(block: nn.Module) -> bool:
    """True where the block's layers alone decide what it computes: no forward replaced, no hook."""
    if type(block) is LeanBlock:
        if "forward" in vars(block):
            return False
        (block,) = block.stock
    if not is_known_block(block):
        return False
    parts = (
        (block, lumina.JointTransformerBlock),
        (block.attention, lumina.JointAttention),
        (block.feed_forward, lumina.FeedForward),
    )
    return all(
        type(part) is kind
        and getattr(part.forward, "__func__", None) is kind.forward
        and not part._forward_hooks
        and not part._forward_pre_hooks
        for part, kind in parts
    )


# Loops over chunks would be unrolled into a graph that writes into views of its own inputs, which
# torch.compile cannot build; so the pieces run eagerly between the compiled parts.
@torch.compiler.disable
def run_block(
    block: nn.Module,
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    rope: RopeFn,
    adaln_input: torch.Tensor | None,
    timestep_zero_index: Sequence[tuple[int, int]] | None,
    transformer_options: dict[str, Any],
    settings: BlockSettings,
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
        settings: how to cut.
    """
    kernels = settings.kernels
    batch, tokens, _ = source.shape
    attention, feed_forward = block.attention, block.feed_forward
    asked = head_groups(transformer_options, attention.n_local_kv_heads)
    groups = max(settings.groups, asked)
    chunk = settings.chunk_tokens(tokens, groups)
    modulation = _modulation(block, adaln_input, batch, tokens, timestep_zero_index)

    def factors(index: int, sample: int) -> Any:
        return None if modulation is None else kernels.modulation(modulation[index][sample])

    with ExitStack() as until:
        linear = functools.partial(fetch.fetch_linear, like=source, until=until)
        norm = functools.partial(fetch.fetch_norm, like=source, until=until)
        qkv = kernels.projection(*linear(attention.qkv))
        out = kernels.projection(*linear(attention.out))
        norm_in, norm_out = norm(block.attention_norm1), norm(block.attention_norm2)
        query_norm = _norm_weight(attention.q_norm, source, until)
        key_norm = _norm_weight(attention.k_norm, source, until)
        heads = kernels.heads(
            attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
        )
        for sample in range(batch):
            kernels.add_attention(
                source[sample],
                target[sample],
                norm_in=norm_in,
                scale=factors(0, sample),
                qkv=qkv,
                rotate_query=functools.partial(_rotate, rope, attention.q_norm, query_norm),
                rotate_key=functools.partial(_rotate, rope, attention.k_norm, key_norm),
                attend=functools.partial(_attend, within_groups(transformer_options)),
                out=out,
                norm_out=norm_out,
                gate=factors(1, sample),
                heads=heads,
                groups=groups,
                chunk_tokens=chunk,
                scratch=None if target is source else target[sample],
            )
    with ExitStack() as until:
        linear = functools.partial(fetch.fetch_linear, like=source, until=until)
        norm = functools.partial(fetch.fetch_norm, like=source, until=until)
        w1, w2, w3 = (
            kernels.projection(*linear(layer))
            for layer in (feed_forward.w1, feed_forward.w2, feed_forward.w3)
        )
        norm_in, norm_out = norm(block.ffn_norm1), norm(block.ffn_norm2)
        for sample in range(batch):
            kernels.add_feed_forward(
                target[sample],
                target[sample],
                norm_in=norm_in,
                scale=factors(2, sample),
                w1=w1,
                w2=w2,
                w3=w3,
                norm_out=norm_out,
                gate=factors(3, sample),
                chunk_tokens=chunk,
                is_clamped=modulation is not None,
            )


class LeanBlock(nn.Module):
    """Stands in for a block of the host under the host's own forward.

    Sampling: `run_block` into a new tensor. With gradients: the block itself under
    torch.utils.checkpoint, so that its activations are computed again in the backward pass.
    Whatever it does not know (a mask, other arguments, a block that another node changed) goes to
    the block as it is.
    """

    def __init__(self, block: nn.Module, settings: BlockSettings) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)
        for name in ("layer_id", "dim", "head_dim", "modulation"):
            setattr(self, name, getattr(block, name))
        self.stock = (block,)  # in a tuple, so that it is no submodule and its weights count once
        self.settings = settings

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        """With the block, so that the host's Train LoRA takes its checkpointing off it again."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield f"{prefix}.stock", self.stock[0]  # its layers are this module's

    def forward(self, x, x_mask, freqs_cis, adaln_input=None, *args, **kwargs):
        (block,) = self.stock
        known = {"timestep_zero_index", "transformer_options"}
        if torch.is_grad_enabled() and _needs_gradients(block, x, adaln_input):
            return torch.utils.checkpoint.checkpoint(
                block, x, x_mask, freqs_cis, adaln_input, *args, use_reentrant=False, **kwargs
            )
        is_unknown = x_mask is not None or args or set(kwargs) - known
        if is_unknown or comfy.model_management.in_training or not is_untouched(block):
            return block(x, x_mask, freqs_cis, adaln_input, *args, **kwargs)
        target = torch.empty_like(x)
        run_block(
            block,
            x,
            target,
            rope=lambda start, stop: freqs_cis[:, start:stop],
            adaln_input=adaln_input,
            timestep_zero_index=kwargs.get("timestep_zero_index"),
            transformer_options=kwargs.get("transformer_options", {}),
            settings=self.settings,
        )
        return target


def _needs_gradients(block: nn.Module, *inputs: torch.Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in inputs) or any(
        p.requires_grad for p in block.parameters()
    )


def _modulation(
    block: nn.Module,
    adaln_input: torch.Tensor | None,
    batch: int,
    tokens: int,
    timestep_zero_index: Sequence[tuple[int, int]] | None,
) -> list[list[Segments]] | None:
    """Segments of factors: scale and gate of the attention, scale and gate of the feed-forward."""
    if not block.modulation:
        return None
    scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(adaln_input).chunk(4, dim=1)
    factors = (1 + scale_msa, gate_msa.tanh(), 1 + scale_mlp, gate_mlp.tanh())
    runs = [(0, tokens, 0)]
    if timestep_zero_index is not None:
        others = lumina.invert_slices(timestep_zero_index, tokens)
        runs = sorted([(*r, batch) for r in timestep_zero_index] + [(*r, 0) for r in others])
    return [
        [[(first, last, f[sample + half]) for first, last, half in runs] for sample in range(batch)]
        for f in factors
    ]


def _norm_weight(layer: nn.Module, like: torch.Tensor, until: ExitStack) -> Any:
    """What `_rotate` needs of q's or k's norm: its weight, or the norm itself on older hosts."""
    if IS_FUSED and fetch.is_plain(layer, comfy.ops.disable_weight_init.RMSNorm):
        return fetch.fetch_weight(layer, like, until)
    return fetch.fetch_norm(layer, like, until)


def _rotate(
    rope: RopeFn, layer: nn.Module, norm: Any, rows: torch.Tensor, start: int
) -> torch.Tensor:
    """Norm and rotary embedding of [T, H, C] rows, whose first is token `start`, as the host's."""

    def rotate(part: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        # [T, H, C], [T, 1, C / 2, 2, 2]
        if not isinstance(norm, torch.Tensor):
            return comfy.quant_ops.ck.apply_rope1(norm(part)[None], table[None])[0]
        epsilon = layer.eps if layer.eps is not None else torch.finfo(torch.float32).eps
        return comfy.quant_ops.ck.rms_rope1(part[None], table[None], norm, epsilon)[0]

    return fetch.by_pieces(rotate, rows, rope(start, start + rows.shape[0])[0])


def _attend(
    transformer_options: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    return lumina.optimized_attention_masked(
        q, k, v, q.shape[1], None, skip_reshape=True, transformer_options=transformer_options
    )
