"""Single kernels of the block and of the VAE, whole as the host calls them and cut as we do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional

# 512 and 320: a chunk of the default's at such lengths, and a rest. Strips of 20 rows leave a rest.
TOKENS, CHUNK_TOKENS, GROUPS, STRIP_ROWS = 832, 512, 2, 20


@dataclass
class Inputs:
    """What the kernels of one dtype get.

    block: the host's first main block.
    decoder: the host's VAE decoder.
    x: residual stream, [1, T, D]; normed: as the products see it.
    table: rotary embedding, [1, T, 1, C / 2, 2, 2], float32.
    factors: scale, gate, scale, gate of the block's halves, [1, 4 * D].
    queries, keys, values: [1, T, H, C], before norm and rotary embedding.
    pixels: a map of the decoder's last level, [1, C, H, W].
    """

    block: Any
    decoder: Any
    x: torch.Tensor
    normed: torch.Tensor
    table: torch.Tensor
    factors: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    pixels: torch.Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        moved = {
            name: value.to(dtype)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name != "table"
        }
        return Inputs(**{**vars(self), **moved})


class Kernel(NamedTuple):
    """whole: as the host calls it; cut: as ours."""

    whole: Callable[[Inputs], torch.Tensor]
    cut: Callable[[Inputs], torch.Tensor]


def chunks() -> Iterator[slice]:
    """The default's chunks of the tokens."""
    from pack.nodes.denoiser import cuts

    for start, stop in cuts.chunks(TOKENS, CHUNK_TOKENS):
        yield slice(start, stop)


def groups(heads: int, count: int) -> Iterator[slice]:
    """So many runs of heads."""
    from pack.nodes.denoiser.cuts import head_groups

    for first, last in head_groups(heads, count):
        yield slice(first, last)


def by_rows(layer: Callable[[Inputs], Any], name: str = "normed") -> Kernel:
    """A layer of the block, on all tokens and chunk by chunk; rows as ours, [T, D]."""

    def cut(given: Inputs) -> torch.Tensor:
        rows = getattr(given, name)[0]
        return torch.cat([layer(given)(rows[part]) for part in chunks()])[None]

    return Kernel(lambda given: layer(given)(getattr(given, name)), cut)


def qkv_by_heads(given: Inputs) -> torch.Tensor:
    """The product feature by feature: q, k and v of each group of heads."""
    from pack.nodes.host.denoiser.projections import projection

    attention, rows = given.block.attention, given.normed[0]
    with ExitStack() as until:
        qkv = projection(attention.qkv, rows, until)
        runs = groups(3 * attention.n_local_heads, 3 * GROUPS)
        width = given.block.head_dim
        return torch.cat([qkv(rows, run.start * width, run.stop * width) for run in runs], 1)[None]


def rms_rope(given: Inputs) -> torch.Tensor:
    """Norm and rotary embedding of q and k, [2, T, H, C]."""
    import comfy.quant_ops

    norms = (given.block.attention.q_norm, given.block.attention.k_norm)
    with ExitStack() as until:
        weights = [_weight(norm, given.queries, until) for norm in norms]
        rotated = comfy.quant_ops.ck.rms_rope(
            given.queries, given.keys, given.table, *weights, _epsilon(norms[0])
        )
        return torch.cat(rotated)


def rms_rope_by_rows(given: Inputs) -> torch.Tensor:
    """As the lean block calls it: q and k one after the other, chunk by chunk."""
    import comfy.quant_ops

    attention = given.block.attention
    pairs = ((attention.q_norm, given.queries), (attention.k_norm, given.keys))
    with ExitStack() as until:
        made = []
        for norm, rows in pairs:
            weight = _weight(norm, rows, until)
            parts = [
                comfy.quant_ops.ck.rms_rope1(
                    rows[:, part], given.table[:, part], weight, _epsilon(norm)
                )
                for part in chunks()
            ]
            made.append(torch.cat(parts, 1))
        return torch.cat(made)


def _weight(norm: Any, like: torch.Tensor, until: ExitStack) -> torch.Tensor:
    from pack.nodes.host.base import fetch

    return fetch.fetch_weights(norm, like, until)[0]


def _epsilon(norm: Any) -> float:
    return norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps


def attention(given: Inputs, heads: slice = slice(None), rows: slice = slice(None)) -> Any:
    """The host's attention of some heads and queries, [1, T, H * C]."""
    import comfy.ldm.lumina.model as lumina

    parts = (given.queries[:, rows, heads], given.keys[:, :, heads], given.values[:, :, heads])
    # [1, T, H, C] -> [1, H, T, C], the memory as it was, as both blocks hand it over
    q, k, v = (part.contiguous().movedim(1, 2) for part in parts)
    return lumina.optimized_attention_masked(
        q, k, v, q.shape[1], None, skip_reshape=True, transformer_options={}
    )


def attention_by_heads(count: int | None) -> Callable[[Inputs], torch.Tensor]:
    """In so many groups of heads; None for one head at a time."""

    def cut(given: Inputs) -> torch.Tensor:
        heads = given.queries.shape[2]
        parts = [attention(given, run) for run in groups(heads, count or heads)]
        return torch.cat(parts, 2)

    return cut


def attention_by_queries(given: Inputs) -> torch.Tensor:
    return torch.cat([attention(given, rows=part) for part in chunks()], 1)


class _Given(torch.nn.Module):
    """Modulation that was chosen, in the place of the layer that computes it."""

    def __init__(self, factors: torch.Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.factors


def half_of_block(closed: int | None) -> Kernel:
    """The host's block and ours, with one of its four factors zero: a closed gate leaves a half."""

    def block_of(given: Inputs) -> Any:
        factors = given.factors.chunk(4, 1)
        factors = [f * 0 if index == closed else f for index, f in enumerate(factors)]
        block = copy.copy(given.block)
        # A shallow copy of a module shares the table of its children with the module.
        vars(block)["_modules"] = dict(vars(given.block)["_modules"])
        block.adaLN_modulation = _Given(torch.cat(factors, 1))
        return block

    def cut(given: Inputs) -> torch.Tensor:
        from pack.nodes.denoiser.plan import DenoiserChoice
        from pack.nodes.denoiser.sizes import Z_IMAGE
        from pack.nodes.host.denoiser.block import BlockSettings, LeanBlock

        settings = BlockSettings(Z_IMAGE, DenoiserChoice("balance", GROUPS, CHUNK_TOKENS))
        return LeanBlock(block_of(given), settings)(given.x, None, given.table, given.factors)

    return Kernel(lambda given: block_of(given)(given.x, None, given.table, given.factors), cut)


def norm_silu(given: Inputs) -> torch.Tensor:
    return functional.silu(given.decoder.norm_out(given.pixels))


def norm_silu_by_strips(given: Inputs) -> torch.Tensor:
    from pack.nodes.host.base import fetch
    from pack.nodes.vae.statistics import GroupStats, NormSiLU

    norm = given.decoder.norm_out
    stats = GroupStats(norm.num_groups, norm.eps)
    for strip in _strips(given):
        stats.add(strip)
    made = torch.empty_like(given.pixels, memory_format=torch.channels_last)
    with ExitStack() as until:
        vectors = fetch.fetch_weights(norm, given.pixels, until)
        silu = NormSiLU(stats.pooled(), *vectors, eps=norm.eps)
        for strip, into in zip(_strips(given), made.split(STRIP_ROWS, 2), strict=True):
            silu.write([strip], into)
    return made


def convolution(given: Inputs) -> torch.Tensor:
    return given.decoder.up[0].block[-1].conv2(given.pixels)


def convolution_by_strips(given: Inputs) -> torch.Tensor:
    from pack.nodes.cuts import pieces
    from pack.nodes.host.base import fetch
    from pack.nodes.vae.strips import Conv

    layer = given.decoder.up[0].block[-1].conv2
    with ExitStack() as until:
        weights = fetch.fetch_weights(layer, given.pixels, until)
        height = given.pixels.shape[2]
        conv = Conv(*weights, height=height)
        pixels = given.pixels.contiguous(memory_format=torch.channels_last)

        def read(first: int, last: int, keep: int) -> list[torch.Tensor]:
            return [pixels[:, :, first:last]]

        made = [conv.make(read, *run, run[1]) for run in pieces(height, STRIP_ROWS)]
    return torch.cat(made, 2)


def _strips(given: Inputs) -> list[torch.Tensor]:
    """The map in strips, in the layout that ours have."""
    pixels = given.pixels.contiguous(memory_format=torch.channels_last)
    return list(pixels.split(STRIP_ROWS, 2))


KERNELS = {
    "block": half_of_block(None),
    "attention half": half_of_block(3),
    "feed-forward half": half_of_block(1),
    "RMS norm by rows": by_rows(lambda given: given.block.attention_norm1, "x"),
    "qkv product by rows": by_rows(lambda given: given.block.attention.qkv),
    "qkv product by heads": Kernel(
        lambda given: given.block.attention.qkv(given.normed), qkv_by_heads
    ),
    "rms_rope by rows": Kernel(rms_rope, rms_rope_by_rows),
    "attention by groups of heads": Kernel(attention, attention_by_heads(GROUPS)),
    "attention by heads": Kernel(attention, attention_by_heads(None)),
    "attention by queries": Kernel(attention, attention_by_queries),
    "out product by rows": by_rows(lambda given: given.block.attention.out),
    "feed-forward by rows": by_rows(lambda given: given.block.feed_forward),
    "group norm by strips": Kernel(norm_silu, norm_silu_by_strips),
    "convolution by strips": Kernel(convolution, convolution_by_strips),
}
