"""A residual stream of a block: rows modulated and added by runs of tokens, with torch's bits."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.denoiser.rows import Shift
from pack.nodes.denoiser.stream import Factors, Stream
from torch.nn import functional

TOKENS, DIM = 37, 24
CUTS = [1, 8, 40]


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(dtype: torch.dtype, *, is_fused: bool, has_gate: bool = True) -> tuple[Stream, list]:
    """A stream of two runs, and scale, shift and gate of each token."""
    source = drawn(DIM, TOKENS, dtype=dtype, seed=0).t()  # rows that are not contiguous
    runs, by_token = [], []
    for seed, (first, last) in enumerate([(0, 20), (20, TOKENS)]):
        scale, shift, gate = drawn(3, DIM, dtype=dtype, seed=seed + 1)
        runs.append(Factors(first, last, Shift(1 + scale, shift), gate if has_gate else None))
        by_token += [torch.stack([1 + scale, shift, gate])] * (last - first)
    norm = lambda rows: functional.layer_norm(rows, (DIM,))  # noqa: E731
    stream = Stream(source, torch.empty(TOKENS, DIM, dtype=dtype), norm, runs, is_fused)
    return stream, list(torch.stack(by_token).unbind(1))


@pytest.mark.parametrize("chunk", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_fused", [True, False])
def test_runs_of_tokens_have_factors_of_their_own(
    is_fused: bool, dtype: torch.dtype, chunk: int
) -> None:
    stream, (scale, shift, gate) = made(dtype, is_fused=is_fused)
    change = drawn(TOKENS, DIM, dtype=dtype, seed=9)
    modulated = torch.addcmul(shift, functional.layer_norm(stream.source, (DIM,)), scale)
    before = stream.source.clone()
    for start in range(0, TOKENS, chunk):
        stop = min(TOKENS, start + chunk)
        assert torch.equal(stream.modulated(start, stop), modulated[start:stop])
        stream.add(change[start:stop].clone(), start)
    wanted = torch.addcmul(before, gate, change) if is_fused else before + gate * change
    assert torch.equal(stream.target, wanted)
    assert torch.equal(stream.source, before)


def test_adds_in_place_and_without_a_gate() -> None:
    stream, _ = made(torch.bfloat16, is_fused=True, has_gate=False)
    before, change = stream.source.clone(), drawn(TOKENS, DIM, dtype=torch.bfloat16, seed=9)
    stream = stream._replace(target=stream.source)
    stream.add(change.clone(), 0)
    assert torch.equal(stream.source, before + change)
    stream = stream._replace(factors=[Factors(0, TOKENS, None, None)])
    rows = stream.modulated(3, 9)
    assert torch.equal(rows, functional.layer_norm(stream.source[3:9], (DIM,)))
