"""Which weights stay on the card from stage to stage, and what the next picture fetches again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .stage import Stage


class Shared(NamedTuple):
    """Bytes of a stage's weights in a second run: still on the card, and fetched again."""

    stays: int
    again: int


def shared(stages: Sequence[Stage], budget_bytes: int | None) -> dict[str, Shared]:
    """What each stage of a second run finds on the card, and what comes there once more.

    Before a stage, weights of the others leave the card until it fits: the model first that was
    used longest ago, and of it as much as is needed. What each sampling step streams is not in it.

    Source: make_room in nodes/host/base/reserve.py.

    Args:
        stages: of one run, in order, each with a model of its own.
        budget_bytes: of the plan; None for no limit.
    """
    resident: Mapping[str, int] = {s.name: s.resident_bytes(budget_bytes) for s in stages}
    on_card: dict[str, int] = {}  # the one used longest ago first
    found: dict[str, Shared] = {}
    for stage in (*stages, *stages):
        stays = on_card.pop(stage.name, 0)
        needed = resident[stage.name] if stage.is_repeated else stage.weight_bytes
        found[stage.name] = Shared(stays, needed - stays)
        if budget_bytes is not None:
            excess = stage.peak_bytes(budget_bytes) + sum(on_card.values()) - budget_bytes
            for name in on_card:
                leaves = min(on_card[name], max(0, excess))
                on_card[name] -= leaves
                excess -= leaves
        on_card[stage.name] = resident[stage.name]
    return found
