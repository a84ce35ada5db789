"""The plain oracle of sliced attention; tests compare."""

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
