"""The gated feed-forward of a block, chunk by chunk."""

from __future__ import annotations

import torch
from torch.nn import functional

from ..cuts import pieces
from .cuts import HIDDEN_BLOCKS, chunks
from .rows import Modulation, Projection, RowsFn, add_rows_, clamp_fp16_


def add_feed_forward(
    source: torch.Tensor,
    target: torch.Tensor,
    *,
    norm_in: RowsFn,
    scale: Modulation | None,
    w1: Projection,
    w2: Projection,
    w3: Projection,
    norm_out: RowsFn,
    gate: Modulation | None,
    chunk_tokens: int,
    is_clamped: bool = True,
) -> None:
    """target = source + gate * norm_out(w2(silu(w1 h) * (w3 h))), h = norm_in(source) * scale.

    Source: the host's JointTransformerBlock and FeedForward (comfy/ldm/lumina/model.py).

    Args:
        source: residual stream, [T, D], float; read only.
        target: [T, D], float; may be `source`.
        norm_in: RMS norm of rows, [T, D] -> new [T, D].
        scale: factors of the normed rows; None for blocks without modulation.
        w1: D -> H, through SiLU.
        w2: H -> D.
        w3: D -> H, the other factor.
        norm_out: RMS norm of the result.
        gate: factors of the normed result; None for blocks without modulation.
        chunk_tokens: rows at a time, >= 1.
        is_clamped: make half-precision results finite after w2, as the host does with modulation.

    Raises:
        ValueError: chunk_tokens < 1.

    Memory: chunk_tokens * (D + 1.25 H) elements, against 3 H + D of the whole.
    Exact: bit-exact on CPU (rows and output features are independent).
    """
    hidden_width = w1.weight.shape[0] if w1.weight is not None else None
    for start, stop in chunks(source.shape[0], chunk_tokens):
        rows = norm_in(source[start:stop])
        if scale is not None:
            scale.multiply_(rows, start)
        hidden = w1(rows)
        if hidden_width is None or w3.weight is None:
            hidden = functional.silu(hidden, inplace=True).mul_(w3(rows))
        else:
            functional.silu(hidden, inplace=True)
            for first, last in pieces(hidden_width, -(-hidden_width // HIDDEN_BLOCKS)):
                hidden[:, first:last].mul_(w3(rows, first, last))
        del rows  # before w2 allocates its result
        change = w2(clamp_fp16_(hidden))
        del hidden  # before the norm allocates
        if is_clamped:
            clamp_fp16_(change)
        change = norm_out(change)
        if gate is not None:
            gate.multiply_(change, start)
        add_rows_(target[start:stop], source[start:stop], change)
        del change  # before the next chunk allocates
