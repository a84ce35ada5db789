"""Where a budget is planned: what was set on Fit to VRAM, and the plan for each call.

The budget is enforced in nodes/host/fit/enforcer.py, which asks for these plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..denoiser.need import (
    References,
    denoiser_live_bytes,
    of_latent,
    with_references,
)
from ..denoiser.plan import DenoiserChoice, denoiser_plan
from ..denoiser.sizes import ControlSizes, Request
from ..prefer import PREFERENCES, Prefer
from ..units import size
from ..vae.choice import VaeChoice
from ..vae.plan import VaeCall
from . import report
from .stage import Stage
from .stages import Models
from .what_fits import WHOLE_RUN, Alternative, Fit, Run, alternatives, fit, text_within


@dataclass(frozen=True)
class Allowance:
    """The plan of one call of a model, as it is enforced.

    need_bytes: everything but weights.
    peak_bytes: everything.
    limit_bytes: the most weights on the card, of the models that are loaded with it too; None where
        no budget is named or all weights fit.
    budget_bytes: for everything; None where no budget is named.
    text: for the node and the log.
    is_warning: the call may run out of memory.
    """

    need_bytes: int
    peak_bytes: int
    limit_bytes: int | None
    budget_bytes: int | None
    text: str
    is_warning: bool


@dataclass(frozen=True)
class Decision(Allowance):
    """The plan of one sampling.

    choice: of the lean blocks.
    live_bytes: least and most predicted bytes of live tensors at the peak, weights excluded. They
        differ because the host may compute prompts one by one, and holds a block's weights where it
        casts or streams them.
    prefetches: a block's weights are copied while another computes.
    """

    choice: DenoiserChoice
    live_bytes: tuple[int, int]
    prefetches: bool


@dataclass(frozen=True)
class TextDecision(Allowance):
    """The plan of one prompt's encoding.

    gathers_rows: the embedding table stays in RAM.
    """

    gathers_rows: bool


@dataclass(frozen=True)
class Planner:
    """Makes a plan for each sampling, each decode and each encode when it begins.

    request: what is known of it before the run; its type and sizes are the model's.
    named_bytes: the budget; 0 for what the card has free.
    margin_bytes: what the host leaves free on the card for other programs.
    floor_bytes: what the host keeps free of weights, besides the margin.
    run: what is known of its stages before the run.
    """

    models: Models
    request: Request
    named_bytes: int
    margin_bytes: int
    prefer: Prefer
    floor_bytes: int = 0
    run: Run = WHOLE_RUN

    def budget_bytes(self, room_bytes: int | None) -> int | None:
        """The budget on a card with that much room; None for no limit."""
        if room_bytes is None:
            return self.named_bytes or None
        room = max(1, room_bytes - self.margin_bytes)
        return min(self.named_bytes or room, room)

    def plan(
        self,
        request: Request,
        room_bytes: int | None,
        *,
        weight_bytes: int | None = None,
        other_bytes: int = 0,
        run: Run | None = None,
    ) -> Fit:
        """The plan of a run.

        Args:
            request: the picture, the batch and the prompt's length.
            room_bytes: on the card; None without one.
            weight_bytes: of the denoiser; None for those of the planner's models.
            other_bytes: of the models that are loaded with it, such as ControlNets.
            run: its stages; None for those of the planner.
        """
        models = self.models
        if weight_bytes is not None:
            models = replace(models, denoiser_weight_bytes=weight_bytes)
        models = replace(models, control_weight_bytes=other_bytes)
        limit, floor = self.budget_bytes(room_bytes), 0
        if limit is not None:
            room = limit if room_bytes is None else room_bytes - self.margin_bytes
            floor = max(0, self.floor_bytes - max(0, room - limit))
        run = replace(run or self.run, least_need_bytes=floor)
        return fit(models, request, limit, prefer=self.prefer, run=run)

    def decide(
        self,
        latent_shape: Sequence[int],
        room_bytes: int | None,
        *,
        prompts: int,
        text_tokens: int | None,
        references: Sequence[References] = (),
        has_patches: bool = False,
        has_refiner_patches: bool = False,
        controls: tuple[ControlSizes, ...] = (),
        weight_bytes: int,
        other_bytes: int,
        is_plain: bool,
    ) -> Decision:
        """The plan of a sampling that begins.

        Args:
            latent_shape: [B, C, H, W] of the pictures.
            room_bytes: free on the card without any of the host's models; None without a card.
            prompts: of one picture that may go in one call.
            text_tokens: of the longest prompt; None if no prompt has a length.
            references: of each prompt that has some.
            has_patches, has_refiner_patches, controls: see `Request`.
            weight_bytes: of the model with its LoRAs.
            other_bytes: of the models that are loaded with it.
            is_plain: no patch or control asks for the host's own forward.

        Raises:
            ValueError: it cannot run in the budget.
        """
        request = of_latent(self.request, latent_shape)
        request = replace(
            request,
            text_tokens=text_tokens or request.text_tokens,
            has_patches=has_patches,
            has_refiner_patches=has_refiner_patches,
            controls=controls,
        )
        request = with_references(request, references)

        def planned(prompts: int) -> Fit:
            # The other stages are planned when they begin.
            run = Run(has_text=False, has_decode=False, prompts=prompts, is_plain=is_plain)
            return self.plan(
                request, room_bytes, weight_bytes=weight_bytes, other_bytes=other_bytes, run=run
            )

        plan = planned(prompts)
        if plan.verdict == "too large":
            plan = planned(1)  # the host takes prompts one by one where they do not fit together
        others = what_else(plan)
        (stage,), limit = plan.stages, plan.budget_bytes
        text = f"{report.headline(plan)} · {stage.setting}"
        if others:
            text += f" · what would fit: {report.either(others)}"
        how = denoiser_plan(plan.request, plan.choice, fill=self.models.fill_tokens)
        one = denoiser_live_bytes(plan.request, how, is_plain=is_plain)
        return Decision(
            *self._enforced(stage, limit),
            text,
            plan.verdict != "fits",
            plan.choice,
            (
                one.peak(has_copies=stage.is_cast),
                stage.activation_bytes + stage.held_bytes(limit),
            ),
            stage.prefetches,
        )

    def decide_text(
        self, tokens: int, room_bytes: int | None, *, weight_bytes: int, table_bytes: int
    ) -> TextDecision:
        """The plan of a prompt's encoding that begins.

        Args:
            tokens: of the prompt.
            room_bytes: see `decide`.
            weight_bytes: of the text encoder with its LoRAs.
            table_bytes: of its embedding table; 0 if that cannot stay in RAM.

        Raises:
            ValueError: it cannot run in the budget.
        """
        models = replace(self.models, text_weight_bytes=weight_bytes, text_table_bytes=table_bytes)
        limit = self.budget_bytes(room_bytes)
        stage = text_within(models, tokens, limit, run=self.run)
        text = f"text encode, {tokens} tokens: {stage.setting}"
        if limit is not None and stage.hard_least_bytes > limit:
            words = report.scores_text(stage)
            raise ValueError(
                f"Fit to VRAM: {text}: the budget must be at least {size(stage.hard_least_bytes)}, "
                f"got {size(limit)}{words and f' ({words})'}: raise budget_gib, or shorten the "
                "prompt"
            )
        is_tight = limit is not None and stage.least_bytes > limit
        gathers_rows = stage.weight_bytes < weight_bytes
        return TextDecision(*self._enforced(stage, limit), text, is_tight, gathers_rows)

    def _enforced(self, stage: Stage, limit: int | None) -> tuple[int, int, int | None, int | None]:
        """The first four fields of an `Allowance`."""
        resident = stage.resident_bytes(limit)
        return (
            stage.need_bytes,
            stage.peak_bytes(limit),
            None if not self.named_bytes or resident == stage.weight_bytes else resident,
            limit if self.named_bytes else None,
        )

    def vae_choice(self, call: VaeCall, room_bytes: int | None) -> VaeChoice:
        """The fastest preference that fits for one decode or encode."""
        limit = self.budget_bytes(room_bytes)
        weights = self.models.on_card_bytes(self.models.vae_weight_bytes)
        for prefer in PREFERENCES[PREFERENCES.index(self.prefer) :]:
            choice = VaeChoice(prefer, 0)
            if limit is None or choice.need(call) + weights <= limit:
                return choice
        return VaeChoice(PREFERENCES[-1], 0)


def what_else(plan: Fit) -> list[Alternative]:
    """What would fit instead of this plan; empty for a plan that fits.

    Raises:
        ValueError: the plan is too large to run at all.
    """
    found = list(alternatives(plan))
    if plan.verdict == "too large":
        instead = f"; what would fit: {report.either(found)}" if found else ""
        most = max(plan.stages, key=lambda stage: stage.is_judged * stage.hard_least_bytes)
        if most.name == "text encode" and not plan.run.has_clip:
            instead += "; or connect clip, so that the text encoder keeps to the budget"
        raise ValueError(f"Fit to VRAM: {report.headline(plan)}{instead}")
    return found
