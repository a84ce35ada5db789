"""Chooses how one call of the denoiser is cut."""

from __future__ import annotations

from .cuts import DenoiserPlan
from .peak import block_elements
from .sizes import Request, TransformerSizes

# Chunks that keep a card's matrix units full: from 512 rows on, common cards read the weights again
# for each chunk while they compute.
CHUNK_TOKENS = (512, 1024, 2048, 4096)
# One head at a time asks for the least memory, and its products are narrow with any chunk.
LEAST_CHUNK_TOKENS = (256, 512)
# Two groups cost one more norm of the stream per block and save half a stream.
DEFAULT_GROUPS = 2
# A larger chunk is taken where it raises the peak by no more than this factor.
SLACK, LEAST_SLACK = 1.03, 1.01


def denoiser_plan(request: Request, *, groups: int, chunk_tokens: int = 0) -> DenoiserPlan:
    """The plan of the whole forward; arguments and errors as `plan_for`."""
    return plan_for(request.sizes, request.batch, request.tokens, groups, chunk_tokens)


def plan_for(
    sizes: TransformerSizes, batch: int, tokens: int, groups: int, chunk_tokens: int = 0
) -> DenoiserPlan:
    """The plan for blocks of that many samples and tokens.

    Args:
        batch: samples in the stream; a block takes them one by one.
        tokens: of a sample.
        groups: into how many groups the heads are cut, >= 1.
        chunk_tokens: rows at a time; 0 takes the largest chunk that hardly raises the peak.

    Raises:
        ValueError: groups < 1 or chunk_tokens < 0.
    """
    if groups < 1:
        raise ValueError(f"groups must be >= 1, got {groups}")
    if chunk_tokens < 0:
        raise ValueError(f"chunk_tokens must be >= 0, got {chunk_tokens}")
    if chunk_tokens:
        return DenoiserPlan(groups, chunk_tokens)
    is_least = groups >= sizes.kv_heads
    choices, slack = (LEAST_CHUNK_TOKENS, LEAST_SLACK) if is_least else (CHUNK_TOKENS, SLACK)
    plans = [DenoiserPlan(groups, chunk) for chunk in choices]
    stream = batch * tokens * sizes.dim
    peaks = [stream + block_elements(sizes, tokens, plan) for plan in plans]
    return [p for p, peak in zip(plans, peaks, strict=True) if peak <= slack * peaks[0]][-1]
