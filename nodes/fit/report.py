"""A plan as a text table and as JSON for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..denoiser.cost import WAITING
from ..units import size
from ..words import with_words
from .sharing import shared
from .stage import ASSUMED_CARD, Stage
from .what_fits import Alternative, Fit


def table(plan: Fit) -> str:
    """The stages as Markdown, which is also readable as plain text."""
    cells = [_cells(stage, plan.budget_bytes) for stage in plan.stages]
    rows = [list(cells[0]), *(list(row.values()) for row in cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    )


def headline(plan: Fit) -> str:
    """The request and whether it fits, in one line."""
    request = plan.request
    asked = f"{request.width_px}x{request.height_px}, batch {request.batch}, "
    if plan.run.prompts > 1:
        asked += f"{plan.run.prompts} prompts at a time, "
    if request.reference_tokens:
        asked += f"{request.reference_tokens} reference tokens, "
    asked += f"{request.text_tokens} text tokens, prefer {plan.prefer}"
    if plan.budget_bytes is None:
        return f"{asked}; no budget: nothing is limited"
    words = {
        "fits": "fits",
        "tight": f"tight: {size(plan.missing_bytes)} short of the room kept for workspaces",
        "too large": f"does not fit: {size(plan.missing_bytes)} short",
    }
    return f"{asked}; budget {size(plan.budget_bytes)}: {words[plan.verdict]}"


def text(
    plan: Fit,
    *,
    others: Sequence[Alternative] = (),
    copy_bytes_per_s: float | None = None,
    notes: Sequence[str] = (),
) -> str:
    """The whole report.

    Args:
        others: what would fit instead, from `alternatives`.
        copy_bytes_per_s: from RAM to the card, measured; None for an assumed one.
    """
    lines = [headline(plan), "", table(plan), ""]
    if streamed := plan.stage("denoise").streamed_bytes(plan.budget_bytes):
        speed = copy_bytes_per_s or ASSUMED_CARD.copy_bytes_per_s
        how = "measured" if copy_bytes_per_s else "assumed, not measured"
        beside = "prefetched while the block before computes"
        if not plan.stage("denoise").prefetches:
            beside = f"not prefetched: up to {100 * WAITING:.0f} % of that is added to the step"
        lines.append(
            f"Each step streams {size(streamed)} of weights from RAM: {streamed / speed:.2f} s at "
            f"{speed / 1e9:.1f} GB/s ({how}), {beside}."
        )
    lines += [
        f"The {stage.name}: {words}." for stage in plan.stages if (words := scores_text(stage))
    ]
    lines.append(shared_text(plan))
    lines += [
        f"Pinned RAM: {stage.setting} keeps {size(stage.ram_bytes)} of feature maps in it."
        for stage in plan.stages
        if stage.ram_bytes
    ]
    if others:
        lines.append(f"What would fit: {either(others)}.")
    return "\n".join([*lines, *notes]).rstrip()


def scores_text(stage: Stage) -> str:
    """What a long prompt's attention scores take, in words; empty where they are no matter."""
    if 2 * stage.score_bytes < stage.activation_bytes:
        return ""
    return (
        f"{size(stage.score_bytes)} of its activations are attention scores, which grow with the "
        "square of the prompt's length"
    )


def shared_text(plan: Fit) -> str:
    """What stays on the card for the next picture and what is copied again, in words."""
    found = shared(plan.stages, plan.budget_bytes)

    def words(of: Mapping[str, int]) -> str:
        return ", ".join(f"{size(count)} of {name}" for name, count in of.items() if count)

    stays = words({name: one.stays for name, one in found.items()})
    again = words({name: one.again for name, one in found.items()})
    text = f"Kept on the card for the next picture: {stays or 'no weights'}."
    if again:
        text += f" Copied again for it, besides what each step streams: {again}."
    if "text encode" in found and found["text encode"].again:
        text += " An unchanged prompt is not encoded again."
    return text


def either(others: Sequence[Alternative]) -> str:
    """What would fit instead, in words."""
    words = {
        "batch": "a batch of {0.batch}",
        "size": "{0.width_px}x{0.height_px}",
        "fp8": "transformer and text encoder in fp8",
    }
    return ", or ".join(words[other.differs_in].format(other.request) for other in others)


def as_json(
    plan: Fit,
    *,
    others: Sequence[Alternative] = (),
    card_bytes: int | None = None,
    named_bytes: int | None = None,
    larger_bytes: int | None = None,
    copy_bytes_per_s: float | None = None,
) -> dict[str, Any]:
    """The plan for the page: bytes by stage, in the order in which they run.

    Saved histories hold this dict: keys are added, never renamed.

    Args:
        others: what would fit instead, from `alternatives`.
        card_bytes: the size of the card; None without one.
        named_bytes: the budget on the node; 0 for what the card has free.
        larger_bytes: the smallest budget that would fit; None where the plan fits, or none would.
        copy_bytes_per_s: from RAM to the card, measured; None for an assumed one.
    """
    budget, request = plan.budget_bytes, plan.request
    denoise = plan.stage("denoise")
    speed = copy_bytes_per_s or ASSUMED_CARD.copy_bytes_per_s
    copy_seconds = denoise.streamed_bytes(budget) / speed
    made = {
        "headline": headline(plan),
        "width": request.width_px,
        "height": request.height_px,
        "batch_size": request.batch,
        "text_tokens": request.text_tokens,
        "verdict": plan.verdict,
        "budget_bytes": budget,
        "card_bytes": card_bytes,
        "missing_bytes": plan.missing_bytes,
        "named_bytes": named_bytes,
        "larger_bytes": larger_bytes,
        "copy_bytes_per_s": speed,
        "is_copy_measured": copy_bytes_per_s is not None,
        "copy_seconds": copy_seconds,
        "wait_seconds": 0.0 if denoise.prefetches else WAITING * copy_seconds,
        "others": [
            {
                "differs_in": other.differs_in,
                "width": other.request.width_px,
                "height": other.request.height_px,
                "batch_size": other.request.batch,
            }
            for other in others
        ],
        "stages": [
            {
                "name": stage.name,
                "setting": stage.setting,
                "weights": stage.weights_on_card_bytes(budget),
                "activations": stage.activation_bytes,
                "stock": stage.stock_bytes,
                "workspace": stage.workspace_bytes,
                "streamed": stage.streamed_bytes(budget) if stage.is_repeated else 0,
                "peak": stage.peak_bytes(budget),
            }
            for stage in plan.stages
        ],
    }
    return with_words(made)


def _cells(stage: Stage, budget_bytes: int | None) -> dict[str, str]:
    return {
        "stage": stage.name,
        "setting": stage.setting,
        "all weights": size(stage.weight_bytes),
        "weights on the card": size(stage.weights_on_card_bytes(budget_bytes)),
        "activations": size(stage.activation_bytes),
        "(ComfyUI alone)": size(stage.stock_bytes),
        "workspace": size(stage.workspace_bytes),
        "peak": size(stage.peak_bytes(budget_bytes)),
    }
