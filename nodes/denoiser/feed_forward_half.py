"""The gated feed-forward of a block, chunk by chunk."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..cuts import pieces
from .cuts import DenoiserPlan, chunks
from .rows import Modulation, Projection, RowsFn, clamp_fp16_


def add_feed_forward(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    norm_in: RowsFn,
    scale: Modulation,
    w1: Projection,
    w2: Projection,
    w3: Projection,
    norm_out: RowsFn,
    gate: Modulation,
    plan: DenoiserPlan,
    is_clamped: bool = True,
) -> None:
    """target = source + gate * norm_out(w2(silu(w1 h) * (w3 h))), h = norm_in(source) * scale.

    Source: the host's JointTransformerBlock and FeedForward (comfy/ldm/lumina/model.py).

    Args:
        source: residual stream, [T, D], float; read only.
        target: [T, D], float; may be `source`.
        norm_in: RMS norm of rows, [T, D] -> new [T, D].
        scale: factors of the normed rows.
        w1: D -> H, through SiLU.
        w2: H -> D.
        w3: D -> H, the other factor.
        norm_out: RMS norm of the result.
        gate: factors of the normed result.
        plan: its feed_tokens and hidden_blocks, >= 1.
        is_clamped: make half-precision results finite after w2, as the host does with modulation.

    Raises:
        ValueError: feed_tokens or hidden_blocks < 1.

    Memory: feed_tokens * (D + (1 + 1 / hidden_blocks) H) elements; the host 4 (D + H).
    Exact: bit-exact on CPU (rows and output features are independent).
    """
    if plan.hidden_blocks < 1:
        raise ValueError(f"hidden_blocks must be >= 1, got {plan.hidden_blocks}")
    for start, stop in chunks(source.shape[0], plan.feed_tokens):
        rows = scale.multiply_(norm_in(source[start:stop]), start)
        hidden = functional.silu(w1(rows), inplace=True)
        blocks = plan.feed_blocks(is_whole=w3.is_whole)
        for first, last in pieces(hidden.shape[1], -(-hidden.shape[1] // blocks)):
            hidden[:, first:last].mul_(w3(rows, first, last))
        del rows  # before w2 allocates its result
        change = w2(clamp_fp16_(hidden))
        del hidden  # before the norm allocates
        if is_clamped:
            clamp_fp16_(change)
        change = gate.multiply_(norm_out(change), start)
        torch.add(source[start:stop], change, out=target[start:stop])
        del change  # before the next chunk allocates
