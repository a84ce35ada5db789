"""The plain oracle of each kernel: short, slow, in the order of the textbook. Tests compare."""

from __future__ import annotations

import torch


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax of the scaled scores plus mask, times value; computed in float64.

    Args:
        query: [B, H, T, D], float.
        key: [B, Hk, S, D], float; Hk divides H, H / Hk neighbouring query heads share one.
        value: [B, Hk, S, Dv], float.
        mask: [T, S], [B, T, S] or [B, H, T, S], sizes of 1 allowed but for S; float is added to
            the scores, bool keeps where true.
        scale: factor of the scores; D ** -0.5 if None.

    Returns:
        [B, H, T, Dv], float64.
    """
    shared = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double(), value.double()
    k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        if mask.ndim == 3:
            mask = mask.unsqueeze(1)  # [B, T, S] -> [B, 1, T, S]
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask
    return scores.softmax(dim=-1) @ v


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
    attended = attention(*(t.movedim(0, 1)[None] for t in (q, k, v)))[0]
    change = attended.movedim(0, 1).flatten(1) @ out.double().T
    return source.double() + gate.double() * rms_norm(change, norm_out)


def group_norm_silu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, groups: int, eps: float = 1e-6
) -> torch.Tensor:
    """SiLU of the group norm of a map [1, C, H, W]; computed in float64."""
    grouped = x.double().unflatten(1, (groups, -1))
    mean = grouped.mean((2, 3, 4), keepdim=True)
    spread = (grouped - mean).square().mean((2, 3, 4), keepdim=True)
    normed = ((grouped - mean) / (spread + eps).sqrt()).flatten(1, 2)
    normed = normed * weight.double()[:, None, None] + bias.double()[:, None, None]
    return normed * normed.sigmoid()


def convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """A 3 x 3 convolution of a map [1, C, H, W] with a padding of 1, tap by tap, in float64."""
    padded = torch.nn.functional.pad(x.double(), (1, 1, 1, 1))
    height, width = x.shape[2:]
    total = torch.zeros(1, weight.shape[0], height, width, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            shifted = padded[:, :, row : row + height, column : column + width]
            total += torch.einsum("oc,bchw->bohw", weight[:, :, row, column].double(), shifted)
    return total if bias is None else total + bias.double()[:, None, None]


def upsampled_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The convolution of the map with each pixel repeated 2 x 2; in float64."""
    return convolution(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias)


def downsampled_convolution(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Every second row and column of the convolution, from the second on; in float64."""
    height, width = (size // 2 * 2 for size in x.shape[2:])
    return convolution(x, weight, bias)[:, :, 1:height:2, 1:width:2]


def residual_block(
    x: torch.Tensor,
    norms: list[tuple[torch.Tensor, torch.Tensor]],
    convolutions: list[tuple[torch.Tensor, torch.Tensor]],
    shortcut: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    groups: int,
) -> torch.Tensor:
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a 1 x 1 convolution; in float64.

    Args:
        x: [1, C, H, W], float.
        norms: weight and bias of each norm, [C].
        convolutions: weight [C_out, C_in, 3, 3] and bias [C_out] of each convolution.
        shortcut: weight [C_out, C, 1, 1] and bias [C_out]; None adds x itself.
    """
    h = x
    for norm, conv in zip(norms, convolutions, strict=True):
        h = convolution(group_norm_silu(h, *norm, groups=groups), *conv)
    if shortcut is not None:
        weight, bias = (part.double() for part in shortcut)
        x = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x.double()) + bias[:, None, None]
    return x.double() + h
