"""Bytes that one call of the denoiser needs, for the host and in words for the user."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..units import MIB
from .cuts import DenoiserPlan
from .peak import lean_peak_bytes, stock_peak_bytes
from .plan import FILL_TOKENS, DenoiserChoice, denoiser_plan
from .sizes import PIXELS_PER_LATENT, Request, round_up

# Text length to assume where the prompt is not known.
TEXT_TOKENS = 512
# What torch's allocator reserves over the live bytes of the denoiser (simulated: 1.1 to 1.7).
DENOISER_RESERVED = 1.7


def denoiser_need_bytes(live_bytes: int) -> int:
    """Bytes to reserve for a call of the lean denoiser with that peak of live bytes."""
    return int(DENOISER_RESERVED * live_bytes)


class LiveBytes(NamedTuple):
    """The live bytes at the peak of one call, weights excluded.

    plain: with weights that multiply as they are stored on the card.
    copied: where the blocks hold copies of their weights, see `lean_peak_bytes`.
    """

    plain: int
    copied: int

    def peak(self, *, has_copies: bool) -> int:
        """The one that holds."""
        return self.copied if has_copies else self.plain


def denoiser_live_bytes(request: Request, plan: DenoiserPlan, *, is_plain: bool) -> LiveBytes:
    """The live bytes at the peak of one call.

    Args:
        is_plain: the lean forward runs. Otherwise lean blocks may run under the host's own forward,
            which holds at most three streams and two rope tables more.
    """
    around = 0 if is_plain else 3 * request.stream_bytes + 2 * request.rope_bytes
    return LiveBytes(
        *(
            lean_peak_bytes(request, plan, has_copies=has_copies) + around
            for has_copies in (False, True)
        )
    )


def denoiser_reserve_bytes(request: Request, plan: DenoiserPlan) -> int:
    """Bytes to reserve for a call whose weights may be copied, under the host's own forward."""
    live = denoiser_live_bytes(request, plan, is_plain=False)
    return denoiser_need_bytes(live.plain) + live.copied - live.plain


def casts_weights(request: Request, weight_bytes: int) -> bool:
    """True where each use of a weight makes a copy in the dtype of the activations.

    So it is with weights of another type, but not those that multiply as they are.
    """
    sizes = request.sizes
    return weight_bytes < sizes.parameters * request.dtype_bytes and not sizes.is_whole


def of_latent(request: Request, latent_shape: Sequence[int]) -> Request:
    """The request for a latent [B, C, H, W]."""
    height, width = (side * PIXELS_PER_LATENT for side in latent_shape[-2:])
    return replace(request, width_px=width, height_px=height, batch=latent_shape[0])


class References(NamedTuple):
    """The reference pictures of one prompt.

    latents: their shapes, [B, C, H, W].
    texts: tokens of their texts; more texts go with the drawn picture.
    features: tokens of their features.
    """

    latents: Sequence[Sequence[int]]
    texts: Sequence[int] = ()
    features: Sequence[int] = ()


def with_references(request: Request, found: Iterable[References]) -> Request:
    """The request of the prompt with the most tokens."""
    requests = (_with_references(request, references) for references in found)
    return max(requests, key=lambda one: one.tokens, default=request)


def _with_references(request: Request, found: References) -> Request:
    sizes, count = request.sizes, len(found.latents)
    if not count:  # the host reads neither texts nor features then
        found = References(())

    def padded(counts: Iterable[int]) -> int:
        return sum(round_up(max(1, each), sizes.pad_multiple) for each in counts)

    # Where a picture has no text or no features, the host pads; the drawn one has no features.
    missing = [0] * max(0, count - len(found.texts))
    features = [*found.features[:count], *[0] * max(0, count - len(found.features))]
    features += [0] if count else []
    return replace(
        request,
        reference_tokens=padded(height * width // sizes.patch**2 for *_, height, width in found[0]),
        reference_text_tokens=padded([*found.texts, *missing]),
        reference_feature_tokens=padded(features) if sizes.has_features else 0,
    )


def predicted_savings(
    request: Request,
    choice: DenoiserChoice,
    *,
    fill: int = FILL_TOKENS,
    mixes_rows: bool = False,
    is_cast: bool = False,
) -> str:
    """The predicted peaks before and after at two picture sizes, in one line.

    Args:
        fill: see `plan_for`.
        mixes_rows: chunks change the rounding of quantised layers.
        is_cast: see `casts_weights`.
    """
    parts = []
    for side in (1024, 2048):
        square = replace(request, width_px=side, height_px=side)
        stock = stock_peak_bytes(square, has_copies=is_cast)
        plan = denoiser_plan(square, choice, fill=fill)
        lean = denoiser_live_bytes(square, plan, is_plain=True).peak(has_copies=is_cast)
        before, after = round(stock / MIB), round(lean / MIB)
        parts.append(f"{before} -> {after} MiB predicted at {side}x{side}")
    return f"activations {' · '.join(parts)}{', rounded by chunk' if mixes_rows else ''}"
