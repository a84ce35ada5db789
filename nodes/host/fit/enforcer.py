"""Where the budget is enforced: plans each sampling when it begins, and keeps it to its plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from comfy import sampler_helpers
from comfy.model_patcher import ModelPatcher
from comfy.samplers import CFGGuider

from ...fit.planner import Decision, Planner
from ...units import MIB
from ..base.device import allocator_bytes, allocator_weights_bytes, is_card
from ..base.options import FIT, OPTIONS_KEY, PREFETCH
from ..base.reserve import make_room, reserved
from ..base.server import NodeLog
from ..denoiser.controlnet import control_sizes
from ..denoiser.patches import patches_of
from . import budget
from .inputs import references_of

# Predicted and measured may differ by this share without a warning.
APART = 0.05


class Enforcer:
    """The two wrappers of one Fit to VRAM node; between two samplings it holds no tensor."""

    def __init__(self, planner: Planner, log: NodeLog) -> None:
        self._planner, self._log = planner, log
        self._is_sampling, self._is_guided, self._is_asked = False, True, False
        self._decision: Decision | None = None
        self._limit: int | None = None
        self._lifts: list[Callable[[], None]] = []

    def prepare(self, executor, model, noise_shape, conds, *args, **kwargs):
        """PREPARE_SAMPLING: plans the sampling, and lets the host load within the plan."""
        is_inner = self._is_sampling and self._is_asked  # of a sampling inside of a sampling
        self._is_asked = True
        if kwargs.get("force_full_load") or kwargs.get("force_offload"):  # training
            return executor(model, noise_shape, conds, *args, **kwargs)
        options = kwargs.get("model_options") or {}
        is_guided = self._is_guided or options.get("disable_cfg1_optimization", False)
        each = [cond for prompts in conds.values() for cond in prompts or ()]
        together = _loaded_with(model, conds)
        patches = patches_of(options.get("transformer_options", {}))
        decision = self._planner.decide(
            noise_shape,
            budget.room_bytes(model.load_device),
            prompts=_prompts(conds, is_guided=is_guided),
            text_tokens=_text_tokens(each),
            references=[references_of(cond) for cond in each],
            has_patches=bool(patches),
            has_refiner_patches="noise_refiner" in patches,
            controls=control_sizes(options.get("transformer_options", {})),
            weight_bytes=budget.weight_bytes(model),
            other_bytes=sum(map(self._on_card_bytes, together)),
            is_plain=_is_plain(each),
        )
        if not is_inner:
            self._decision, self._limit = decision, None
        self._say(decision.text, is_warning=decision.is_warning)
        # The lean blocks read the choice in the options of this sampling alone.
        asked = options.setdefault("transformer_options", {})
        planned = {FIT: decision.choice, PREFETCH: decision.prefetches}
        asked[OPTIONS_KEY] = {**asked.get(OPTIONS_KEY, {}), **planned}
        make_room([model, *together], decision.peak_bytes, decision.budget_bytes)
        _, estimate = sampler_helpers.estimate_memory(model, noise_shape, conds)
        limit = self._limit = _least(self._limit, decision.limit_bytes)
        parts = budget.shares([model, *together], limit)
        with ExitStack() as until:
            until.enter_context(reserved(model, estimate, decision.need_bytes))
            for part in parts:
                until.enter_context(budget.loading_within(*part))
            result = executor(model, noise_shape, conds, *args, **kwargs)
        self._lifts += [lift for part in parts if (lift := budget.limit_weights(*part))]
        return result

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE: lifts the limit at the end, and compares the peak with the plan."""
        if self._is_sampling:  # a sampling inside of a sampling
            return executor(*args, **kwargs)
        guider = executor.class_obj
        device = guider.model_patcher.load_device
        sampler = args[2] if len(args) > 2 else kwargs.get("sampler")
        self._is_guided = _is_guided(guider, sampler)
        before = _readings(device)
        self._is_sampling, self._is_asked, self._decision = True, False, None
        try:
            result = executor(*args, **kwargs)
        finally:
            self._is_sampling = False
            while self._lifts:
                self._lifts.pop()()
        if not self._is_asked:
            self._say("a later node replaced this plan: no budget is enforced")
        elif self._decision is not None and before is not None:
            self._compare(self._decision, before, _readings(device))
        return result

    def _on_card_bytes(self, patcher: Any) -> int:
        return self._planner.models.on_card_bytes(patcher.model_size())

    def _compare(self, decision: Decision, before: Any, after: Any) -> None:
        # What was in the allocator before, other than weights, is not this sampling's.
        weights_then, current, peak_then = before
        weights, _, peak = after
        if peak <= peak_then:
            line = f"measured: unknown, an earlier peak of {_mib(peak_then)} was higher"
            return self._say(f"{decision.text}\n{line}")
        least, most = (live + weights for live in decision.live_bytes)
        measured = peak - (current - weights_then)
        off = max(measured / most - 1, 1 - measured / least, 0)
        predicted = _mib(most) if least == most else f"{_mib(least)} to {_mib(most)}"
        line = f"weights and activations: predicted {predicted}, measured {_mib(measured)}"
        if off > APART:
            line += f", {100 * off:.0f} % apart"
        self._say(f"{decision.text}\n{line}", is_warning=off > APART)

    def _say(self, text: str, *, is_warning: bool = False) -> None:
        self._log.say(text, logging.WARNING if is_warning else logging.INFO)


def _readings(device: torch.device) -> tuple[int, int, int] | None:
    """Weights in torch's allocator, its current and its peak bytes; None without a card."""
    if not is_card(device):
        return None
    return (allocator_weights_bytes(device), *allocator_bytes(device))


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _is_guided(guider: Any, sampler: Any) -> bool:
    """Whether the negative prompt may be computed, which the host skips at cfg 1."""
    is_own = type(guider).predict_noise is not CFGGuider.predict_noise
    function = getattr(sampler, "sampler_function", None)
    # These samplers ask for it once they run.
    is_cfg_pp = "cfg_pp" in getattr(function, "__name__", "")
    return is_own or is_cfg_pp or not math.isclose(guider.cfg, 1.0)


def _prompts(conds: Mapping[str, Any], *, is_guided: bool) -> int:
    """How many prompts of one picture may be in one call."""
    computed = (found for name, found in conds.items() if is_guided or name != "negative")
    return max(1, sum(len(found or ()) for found in computed))


def _loaded_with(model: ModelPatcher, conds: Mapping[str, Any]) -> list[Any]:
    """The models that the host loads with this one: patches, ControlNets."""
    others, _ = sampler_helpers.get_additional_models(conds, model.model_dtype())
    others += model.get_nested_additional_models()
    return list(dict.fromkeys([*model.model_patches_models(), *others]))


def _text_tokens(conds: Sequence[Mapping[str, Any]]) -> int | None:
    texts: list[Any] = [cond.get("cross_attn") for cond in conds]
    return max((text.shape[1] for text in texts if getattr(text, "ndim", 0) == 3), default=None)


def _is_plain(conds: Sequence[Mapping[str, Any]]) -> bool:
    return not any("control" in cond for cond in conds)


def _mib(count: int) -> str:
    return f"{count / MIB:.0f} MiB"
