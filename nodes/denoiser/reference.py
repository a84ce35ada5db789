"""The plain oracle of each kernel: short, slow, in the order of the textbook. Tests compare."""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, *, epsilon: float = 1e-5) -> torch.Tensor:
    """Rows over the root of their mean square, times weight [C]; computed in float64."""
    x = rows.double()
    return x * (x.square().mean(dim=-1, keepdim=True) + epsilon).rsqrt() * weight.double()


def rotary(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns each pair of neighbouring channels by its token's 2 x 2 matrix; computed in float64.

    Args:
        rows: [T, H, C], float.
        table: [T, C / 2, 2, 2], float.
    """
    pairs = rows.double().unflatten(-1, (-1, 2))
    return torch.einsum("tcij,thcj->thci", table.double(), pairs).flatten(2)


def feed_forward_half(
    source: torch.Tensor,
    *,
    norm_in: torch.Tensor,
    scale: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
    norm_out: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """source + gate * norm(w2(silu(w1 h) * (w3 h))), h = norm(source) * scale; in float64.

    Args:
        source: [T, D], float.
        norm_in: weight of the first norm, [D].
        scale: factors of the normed rows, [T, D] or [1, D].
        w1: [H, D].
        w2: [D, H].
        w3: [H, D].
        norm_out: weight of the second norm, [D].
        gate: factors of the result, [T, D] or [1, D].
    """
    h = rms_norm(source, norm_in) * scale.double()
    gated, other = h @ w1.double().T, h @ w3.double().T
    change = (gated * gated.sigmoid() * other) @ w2.double().T
    return source.double() + gate.double() * rms_norm(change, norm_out)


def attention_half(
    source: torch.Tensor,
    *,
    norm_in: torch.Tensor,
    scale: torch.Tensor,
    qkv: torch.Tensor,
    query_norm: torch.Tensor,
    key_norm: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
    norm_out: torch.Tensor,
    gate: torch.Tensor,
) -> torch.Tensor:
    """source + gate * norm(out(attention of h's q, k, v)), h = norm(source) * scale; in float64.

    Args:
        source: [T, D], float.
        norm_in: weight of the first norm, [D].
        scale: factors of the normed rows, [T, D] or [1, D].
        qkv: query heads, then key heads, then as many value heads, [(Hq + 2 Hk) * C, D].
        query_norm: weight of the norm of each query head, [C].
        key_norm: weight of the norm of each key head, [C].
        table: rotary embedding of each token, [T, C / 2, 2, 2].
        out: [D, Hq * C].
        norm_out: weight of the last norm, [D].
        gate: factors of the result, [T, D] or [1, D].
    """
    width, channels = out.shape[1], query_norm.shape[0]
    shared = (qkv.shape[0] - width) // 2
    rows = (rms_norm(source, norm_in) * scale.double()) @ qkv.double().T
    q, k, v = (
        part.unflatten(-1, (-1, channels)) for part in rows.split([width, shared, shared], 1)
    )
    q, k = rotary(rms_norm(q, query_norm), table), rotary(rms_norm(k, key_norm), table)
    # [T, H, C] -> [1, H, T, C]
    q, k, v = (t.movedim(0, 1)[None] for t in (q, k, v))
    attended = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0]
    change = attended.movedim(0, 1).flatten(1) @ out.double().T
    return source.double() + gate.double() * rms_norm(change, norm_out)


def cross_attention(
    source: torch.Tensor,
    *,
    text: torch.Tensor,
    scale: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    channels: int,
) -> torch.Tensor:
    """source + out(attention of (source * scale)'s q to the text's k and v), in float64.

    Args:
        source: [T, D], float.
        text: [S, E], float.
        scale: factors of the rows, [D].
        query: [H * C, D].
        key, value: [H * C, E].
        out: [D, H * C].
        channels: C.
    """
    q, k, v = (
        (rows.double() @ weight.double().T).unflatten(-1, (-1, channels)).movedim(0, 1)[None]
        for rows, weight in ((source * scale, query), (text, key), (text, value))
    )
    attended = functional.scaled_dot_product_attention(q, k, v)[0]
    return source.double() + attended.movedim(0, 1).flatten(1) @ out.double().T
