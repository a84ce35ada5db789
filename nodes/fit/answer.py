"""The plan for a question of the page, with what would fit instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..denoiser.need import TEXT_TOKENS
from ..denoiser.sizes import Request, round_up
from ..units import GIB
from ..words import Words
from . import report
from .planner import Planner
from .stages import Models
from .what_fits import Fit, Run, alternatives

# Of the node's widget.
BUDGET_STEP_BYTES = GIB // 4


def budget_that_fits(planner: Planner, plan: Fit, room_bytes: int | None) -> int | None:
    """The smallest budget that would fit, in steps of the node's widget.

    Args:
        planner: of the plan.
        room_bytes: on the card; None without one.

    Returns:
        Bytes; None where the plan fits, or where no budget would.
    """
    if plan.budget_bytes is None or plan.verdict == "fits":
        return None
    named = round_up(plan.budget_bytes + plan.missing_bytes, BUDGET_STEP_BYTES)
    larger = replace(planner, named_bytes=named).plan(plan.request, room_bytes, run=plan.run)
    return named if larger.verdict == "fits" else None


def answer(
    asked: Mapping[str, Any],
    room_bytes: int | None,
    margin_bytes: int,
    *,
    models: Models,
    card_bytes: int | None = None,
) -> dict[str, Any]:
    """The plan for a question of the page.

    Args:
        asked: the node's inputs width, height, batch_size, budget_gib and prefer, and has_vae and
            has_clip: whether a VAE and a CLIP are connected, which then keep to the budget.
        room_bytes: on the card; None without one.
        margin_bytes: see `Planner`.
        models: as they are published.
        card_bytes: the size of the card; None without one.

    Raises:
        ValueError, TypeError, KeyError: an input is missing or not valid.
    """
    width, height, batch = (int(_number(asked, n)) for n in ("width", "height", "batch_size"))
    request = Request(width, height, batch, TEXT_TOKENS)
    named = int(_number(asked, "budget_gib") * GIB)
    run = Run(has_lean_vae=bool(asked["has_vae"]), has_clip=bool(asked.get("has_clip")))
    planner = Planner(models, request, named, margin_bytes, asked["prefer"], run=run)
    plan = planner.plan(request, room_bytes)
    return report.as_json(
        plan,
        others=list(alternatives(plan)),
        card_bytes=card_bytes,
        named_bytes=named,
        larger_bytes=budget_that_fits(planner, plan, room_bytes),
    )


def _number(asked: Mapping[str, Any], name: str) -> float:
    value = asked[name]
    if not isinstance(value, int | float):  # None for what is known only in the run
        raise ValueError(Words("notNumber", "$1 must be a number, got $2", name, value))
    return value
