"""Plans a sampling when it begins, and keeps the model within the budget while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from . import budget, notice, probe_device
from .attention import FIT, OPTIONS_KEY
from .lean_forward import HANDOVER_PATCHES

logger = logging.getLogger(__name__)

_KEY = f"{OPTIONS_KEY}.fit_to_vram"
MIB = 2**20


class Situation(NamedTuple):
    """What is known when a sampling begins.

    latent_shape: [B, C, H, W].
    text_tokens: of the longest prompt; None if no prompt tells.
    weight_bytes: of the model with its LoRAs.
    room_bytes: see `budget.room_bytes`.
    is_plain: no patch or control asks for the host's own forward.
    """

    latent_shape: Sequence[int]
    text_tokens: int | None
    weight_bytes: int
    room_bytes: int | None
    is_plain: bool


class Decision(Protocol):
    """What memory's planner decides, see there."""

    groups: int
    activation_bytes: int
    need_bytes: int
    limit_bytes: int | None
    budget_bytes: int | None
    text: str
    is_warning: bool


DecideFn = Callable[[Situation], Any]


class Watch:
    """The wrappers of one Fit to VRAM node; between two samplings it holds no tensor."""

    def __init__(self, decide: DecideFn, node_id: str | None) -> None:
        self._decide, self._node_id = decide, node_id
        self._decision: Decision | None = None
        self._lift: Callable[[], None] | None = None

    def prepare(self, executor, model, noise_shape, conds, *args, **kwargs):
        """PREPARE_SAMPLING: plans, and has the host load within the plan."""
        options = kwargs.get("model_options") or {}
        situation = Situation(
            list(noise_shape),
            _text_tokens(conds),
            weight_bytes(model),
            budget.room_bytes(model.load_device),
            _is_plain(conds, options.get("transformer_options", {})),
        )
        decision = self._decision = self._decide(situation)
        level = logging.WARNING if decision.is_warning else logging.INFO
        logger.log(level, "Fit to VRAM: %s", decision.text)
        notice.show_text(self._node_id, decision.text)
        _ask_groups(options, decision.groups)
        budget.make_room(model, decision.need_bytes, decision.budget_bytes)
        reserve = decision.need_bytes + budget.fence_bytes(model.load_device, decision.budget_bytes)
        with budget.reserved(model, noise_shape, reserve):
            result = executor(model, noise_shape, conds, *args, **kwargs)
        self._lift = budget.limit_pages(model, decision.limit_bytes)
        return result

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: lifts the limit at the end, and compares the peak with the plan."""
        patcher = executor.class_obj.model_patcher
        self._decision = None
        gauge = probe_device.gauge_of(patcher.load_device)
        _, peak_before = gauge.read()
        try:
            return executor(*args, **kwargs)
        finally:
            if self._lift is not None:
                self._lift()
                self._lift = None
            decision, self._decision = self._decision, None
            if decision is not None:
                self._compare(decision, patcher, peak_before, gauge.read()[1])

    def _compare(
        self, decision: Decision, patcher: ModelPatcher, peak_before: int, peak_bytes: int
    ) -> None:
        device = patcher.load_device
        if budget.room_bytes(device) is None:
            return
        predicted = decision.activation_bytes + probe_device.weights_bytes(device)
        line = f"predicted {_mib(predicted)}"
        level = logging.INFO
        if peak_bytes <= peak_before:
            line += f", measured: not above the earlier peak of {_mib(peak_before)}"
        else:
            line += f", measured {_mib(peak_bytes)}"
            off = abs(peak_bytes - predicted) / predicted
            if off > 0.05:
                level = logging.WARNING
                line += f": {100 * off:.0f} % apart"
        logger.log(level, "Fit to VRAM: weights and activations while sampling: %s", line)
        notice.show_text(self._node_id, f"{decision.text}\n{line}")


def with_watch(model: ModelPatcher, watch: Watch) -> ModelPatcher:
    """Puts the outer wrapper of a watch on a clone that was made for it."""
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, _KEY)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, watch.outer_sample)
    return model


def weight_bytes(patcher: Any) -> int:
    """Bytes of a model's weights with its LoRAs."""
    return patcher.model_size() + budget.patch_bytes(patcher)


def _text_tokens(conds: Mapping[str, Any]) -> int | None:
    found = [
        cond["cross_attn"].shape[1]
        for prompts in conds.values()
        for cond in prompts or ()
        if getattr(cond.get("cross_attn"), "ndim", 0) == 3
    ]
    return max(found, default=None)


def _is_plain(conds: Mapping[str, Any], transformer_options: Mapping[str, Any]) -> bool:
    patches = transformer_options.get("patches", {})
    if any(patches.get(name) for name in HANDOVER_PATCHES):
        return False
    handed = ("control", "reference_latents")
    return not any(
        name in cond for prompts in conds.values() for cond in prompts or () for name in handed
    )


def _ask_groups(model_options: dict[str, Any], groups: int) -> None:
    """Leaves the groups where the lean block finds them; the options are this sampling's own."""
    options = model_options.setdefault("transformer_options", {})
    options[OPTIONS_KEY] = {**options.get(OPTIONS_KEY, {}), FIT: groups}


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB"
