"""Sliced attention equals the whole call, and its buffers shrink with the slice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.attention import reference
from pack.nodes.attention.slices import Geometry, Slices, geometry, sliced_attention
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode


def _inputs(
    *,
    heads: int = 6,
    kv_heads: int | None = None,
    queries: int = 131,
    keys: int | None = None,
    channels: int = 24,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seeded query [B, H, T, D], key and value [B, Hk, S, D]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, count, tokens, channels, generator=generator).to(dtype)

    kv_heads, keys = kv_heads or heads, keys or queries
    return draw(heads, queries), draw(kv_heads, keys), draw(kv_heads, keys)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] -> [B, T, H * D]."""
    return tensor.transpose(1, 2).flatten(2)


class Sdpa:
    """torch's attention in the host's calling convention; keeps the shapes it was asked for."""

    def __init__(self, *, skip_reshape: bool, skip_output_reshape: bool) -> None:
        self.skip_reshape = skip_reshape
        self.skip_output_reshape = skip_output_reshape
        self.seen: list[tuple[int, int]] = []

    def __call__(self, query: Any, key: Any, value: Any, mask: Any, heads: int) -> torch.Tensor:
        if not self.skip_reshape:
            channels = query.shape[-1] // heads
            query, key, value = (
                t.unflatten(-1, (-1, channels)).transpose(1, 2) for t in (query, key, value)
            )
        self.seen.append((query.shape[1], query.shape[2]))
        assert query.shape[1] == heads
        if mask is not None and mask.ndim == 3:
            mask = mask.unsqueeze(1)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=key.shape[1] != heads
        )
        return out if self.skip_output_reshape else _flat(out)


SLICES = [
    Slices(1, 10**6),
    Slices(4, 10**6),  # a remainder of 2
    Slices(10**6, 10**6),
    Slices(10**6, 1),
    Slices(10**6, 64),  # a remainder of 3
    Slices(10**6, 131),
    Slices(4, 50),
    Slices(1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", SLICES)
@pytest.mark.parametrize("skip_reshape", [False, True])
@pytest.mark.parametrize("skip_output_reshape", [False, True])
def test_equals_the_oracle_in_every_layout(
    dtype: torch.dtype, slices: Slices, skip_reshape: bool, skip_output_reshape: bool
) -> None:
    q, k, v = _inputs(dtype=dtype)
    wanted = reference.attention(q, k, v)
    if not skip_output_reshape:
        wanted = _flat(wanted)
    attend = Sdpa(skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
    got = sliced_attention(
        *((q, k, v) if skip_reshape else map(_flat, (q, k, v))),
        attend=attend,
        heads=6,
        slices=slices,
        skip_reshape=skip_reshape,
        skip_output_reshape=skip_output_reshape,
    )
    assert got.dtype == dtype and got.shape == wanted.shape
    error = (got - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype]
    assert len(attend.seen) == -(-6 // min(6, slices.heads)) * -(-131 // min(131, slices.queries))
    assert max(h for h, _ in attend.seen) == min(6, slices.heads)
    assert max(t for _, t in attend.seen) == min(131, slices.queries)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [Slices(1, 512), Slices(2, 512), Slices(3, 256), Slices(1, 64)])
@pytest.mark.parametrize("by_token", [False, True])
def test_is_bit_exact_at_the_channels_of_z_image(
    dtype: torch.dtype, slices: Slices, by_token: bool
) -> None:
    q, k, v = _inputs(heads=3, queries=544, channels=128, batch=1, dtype=dtype)
    if by_token:  # the same tensors, laid out [B, T, H, D]
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    attend = Sdpa(skip_reshape=True, skip_output_reshape=True)
    whole = attend(q, k, v, None, 3)
    options: dict[str, Any] = {"skip_reshape": True, "skip_output_reshape": True}
    got = sliced_attention(q, k, v, attend=attend, heads=3, slices=slices, **options)
    assert torch.equal(got, whole)
    assert got.stride() == whole.stride()


MASKS = {
    "2 axes": (131, 77),
    "2 axes, keys only": (1, 77),
    "3 axes": (2, 131, 77),
    "3 axes, one sample": (1, 131, 77),
    "4 axes": (2, 6, 131, 77),
    "4 axes, one head": (2, 1, 131, 77),
    "4 axes, keys only": (2, 1, 1, 77),
    "4 axes, one sample": (1, 6, 131, 77),
}


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("slices", [Slices(1, 131), Slices(4, 131), Slices(6, 50), Slices(4, 50)])
def test_masks_and_cross_attention(shape: tuple[int, ...], kind: str, slices: Slices) -> None:
    q, k, v = _inputs(keys=77)
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = drawn > -0.5 if kind == "bool" else drawn
    got = sliced_attention(
        *map(_flat, (q, k, v)),
        mask,
        attend=Sdpa(skip_reshape=False, skip_output_reshape=False),
        heads=6,
        slices=slices,
    )
    torch.testing.assert_close(got, _flat(reference.attention(q, k, v, mask)).float())


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 12])
@pytest.mark.parametrize("heads_per_slice", [1, 2, 3, 4, 5, 6, 7, 12])
@pytest.mark.parametrize("skip_reshape", [False, True])
def test_shared_keys_and_values(kv_heads: int, heads_per_slice: int, skip_reshape: bool) -> None:
    q, k, v = _inputs(heads=12, kv_heads=kv_heads)
    mask = torch.randn(2, 12, 131, 131, generator=torch.Generator().manual_seed(1))
    attend = Sdpa(skip_reshape=skip_reshape, skip_output_reshape=True)
    got = sliced_attention(
        *((q, k, v) if skip_reshape else map(_flat, (q, k, v))),
        mask,
        attend=attend,
        heads=12,
        slices=Slices(heads_per_slice, 64),
        skip_reshape=skip_reshape,
        skip_output_reshape=True,
        enable_gqa=True,
    )
    torch.testing.assert_close(got, reference.attention(q, k, v, mask).float())
    assert max(h for h, _ in attend.seen) <= heads_per_slice


def test_another_width_and_dtype_of_values() -> None:
    q, k, _ = _inputs()
    v = torch.randn(2, 6, 131, 40, generator=torch.Generator().manual_seed(1))
    got = sliced_attention(
        q,
        k,
        v,
        attend=lambda q, k, v, mask, heads: reference.attention(q, k, v, mask),
        heads=6,
        slices=Slices(4, 100),
        skip_reshape=True,
        skip_output_reshape=True,
    )
    assert got.dtype == torch.float64 and got.is_contiguous()
    torch.testing.assert_close(got, reference.attention(q, k, v))


@pytest.mark.parametrize("query_by_token", [False, True])
@pytest.mark.parametrize("result_by_token", [False, True])
def test_lies_in_memory_as_the_slices_do(query_by_token: bool, result_by_token: bool) -> None:
    """Whatever the query's layout: a caller that could view the whole result still can."""
    q, k, v = _inputs()
    if query_by_token:
        q = q.transpose(1, 2).contiguous().transpose(1, 2)

    def attend(query: Any, key: Any, value: Any, mask: Any, heads: int) -> torch.Tensor:
        out = reference.attention(query, key, value, mask)
        return out.transpose(1, 2).contiguous().transpose(1, 2) if result_by_token else out

    options: dict[str, Any] = {"skip_reshape": True, "skip_output_reshape": True}
    got = sliced_attention(q, k, v, attend=attend, heads=6, slices=Slices(2, 100), **options)
    assert got.stride() == attend(q, k, v, None, 6).stride()


def test_gradients_flow_through_the_slices() -> None:
    q, k, v = (t.double().requires_grad_() for t in _inputs(batch=1, queries=20))
    attend = Sdpa(skip_reshape=True, skip_output_reshape=False)
    whole = torch.autograd.grad(attend(q, k, v, None, 6).square().sum(), (q, k, v))
    options: dict[str, Any] = {"attend": attend, "heads": 6, "skip_reshape": True}
    got = sliced_attention(q, k, v, slices=Slices(4, 7), **options)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (q, k, v)), whole)


def test_never_writes_into_what_it_is_given() -> None:
    inputs = (*_inputs(), torch.zeros(131, 131))
    before = [t.clone() for t in inputs]
    attend = Sdpa(skip_reshape=True, skip_output_reshape=False)
    sliced_attention(*inputs, attend=attend, heads=6, slices=Slices(1, 64), skip_reshape=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def _plain(query: Any, key: Any, value: Any, mask: Any, heads: int) -> torch.Tensor:
    """Two score buffers at the peak: scores and their softmax."""
    scores = query @ key.transpose(-1, -2)
    weights = scores.softmax(dim=-1)
    del scores
    return _flat(weights @ value)


@pytest.mark.parametrize(
    "slices",
    [Slices(30, 4352), Slices(15, 4352), Slices(6, 4352), Slices(1, 4352), Slices(5, 1088)],
)
def test_peak_at_the_sizes_of_z_image(slices: Slices) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 30, 4352, 128, dtype=torch.bfloat16) for _ in range(3))
        with Tracker() as tracker:
            out = sliced_attention(
                q, k, v, attend=_plain, heads=30, slices=slices, skip_reshape=True
            )
    out_bytes = out.numel() * 2
    scores = slices.heads * slices.queries * 4352 * 2 * 2
    part = slices.heads * slices.queries * 128 * 2
    assert scores <= tracker.peak_bytes <= scores + out_bytes + part
    assert tracker.current_bytes == out_bytes


def test_two_calls_allocate_alike_and_leave_only_the_result() -> None:
    sequences = []
    for _ in range(2):
        with FakeTensorMode():
            q, k, v = (torch.empty(1, 6, 512, 128) for _ in range(3))
            with Tracker(log=True) as tracker:
                out = sliced_attention(
                    q, k, v, attend=_plain, heads=6, slices=Slices(2, 128), skip_reshape=True
                )
        sequences.append(tracker.sequence())
        assert [life.nbytes for life in sequences[-1] if life.ticks is None] == [out.nbytes]
    assert sequences[0] == sequences[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slices": Slices(0, 64)}, "slices must be >= 1, got 0 heads, 64 queries"),
        ({"slices": Slices(1, 0)}, "slices must be >= 1, got 1 heads, 0 queries"),
        ({"heads": 5}, "must fit one another and heads"),
        ({"skip_reshape": False}, "must have 3 axes"),
        ({"mask": torch.zeros(130, 131)}, r"mask must be .* 131\) or 1, got \(130, 131\)"),
        ({"mask": torch.zeros(131)}, "mask must be"),
        ({"attend": lambda q, *_: q[:, :, :1]}, r"attend must return 2 heads and 131 queries"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    q, k, v = _inputs()
    options = {
        "mask": None,
        "attend": Sdpa(skip_reshape=True, skip_output_reshape=False),
        "heads": 6,
        "slices": Slices(2, 10**6),
        "skip_reshape": True,
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sliced_attention(q, k, v, **options)


def test_geometry_refuses_fewer_key_heads_unless_told() -> None:
    q, k, v = _inputs(kv_heads=2)
    with pytest.raises(ValueError, match="must fit one another"):
        geometry(q, k, v, heads=6, skip_reshape=True)
    wanted = Geometry(batch=2, heads=6, kv_heads=2, queries=131, keys=131, channels=24)
    assert geometry(q, k, v, heads=6, skip_reshape=True, enable_gqa=True) == wanted
    assert geometry(*map(_flat, (q, k, v)), heads=6, enable_gqa=True) == wanted
    with pytest.raises(ValueError, match="must fit one another"):
        geometry(q, *(t.repeat(1, 2, 1, 1) for t in (k, v)), heads=6, skip_reshape=True)
