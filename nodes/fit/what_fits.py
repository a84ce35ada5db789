"""Chooses the settings of all our nodes for a picture and a budget; finds what else would fit."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ..denoiser.plan import DenoiserChoice
from ..denoiser.sizes import Request
from ..prefer import PREFERENCES, Prefer, check_prefer
from .stage import Stage
from .stages import (
    DENOISER_CHOICES,
    Models,
    denoise_stages,
    text_stage,
    vae_stage,
    vae_stages,
)
from .text_encoder import QWEN3_4B

# Between the sides of the pictures that are searched.
STEP_PX = 16
Verdict = Literal["fits", "tight", "too large"]


@dataclass(frozen=True)
class Run:
    """The stages of a run.

    has_text: the prompt is still to be encoded.
    has_clip: the text encoder is kept within the budget.
    has_encode: a picture is encoded first.
    has_decode: a picture is decoded at the end.
    has_lean_vae: Lean VAE decodes; otherwise the host's own decode is shown but not judged.
    prompts: of one picture, in one call of the denoiser.
    is_plain: see `denoise_stages`.
    least_need_bytes: the host keeps at least this much free of weights while it denoises.
    """

    has_text: bool = True
    has_clip: bool = True
    has_encode: bool = False
    has_decode: bool = True
    has_lean_vae: bool = True
    prompts: int = 1
    is_plain: bool = True
    least_need_bytes: int = 0


WHOLE_RUN = Run()


@dataclass(frozen=True)
class Fit:
    """A plan.

    models, request, run, prefer: what the plan is for.
    budget_bytes: for weights, activations and workspaces together; None for no limit.
    stages: with the chosen settings, in the order in which they run.
    choice: what was chosen for the denoiser.
    """

    models: Models
    request: Request
    run: Run
    budget_bytes: int | None
    prefer: Prefer
    stages: tuple[Stage, ...]
    choice: DenoiserChoice

    @property
    def verdict(self) -> Verdict:
        """fits; tight: fits only without room for workspaces; too large: cannot run at all."""
        budget, judged = self.budget_bytes, [stage for stage in self.stages if stage.is_judged]
        if budget is None or all(stage.least_bytes <= budget for stage in judged):
            return "fits"
        is_possible = all(stage.hard_least_bytes <= budget for stage in judged)
        return "tight" if is_possible else "too large"

    @property
    def missing_bytes(self) -> int:
        """How much larger the budget must be for the plan to fit."""
        least = max((stage.least_bytes for stage in self.stages if stage.is_judged), default=0)
        return 0 if self.budget_bytes is None else max(0, least - self.budget_bytes)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def fit(
    models: Models,
    request: Request,
    budget_bytes: int | None,
    *,
    prefer: Prefer = "balance",
    run: Run = WHOLE_RUN,
) -> Fit:
    """A plan with the fastest allowed settings that fit, or else with the smallest.

    Of the denoiser's those are fastest whose steps have the least modelled time, the weights that
    they leave to be streamed included.

    Args:
        request: the picture, the batch of pictures and the prompt's length.
        budget_bytes: see `Fit`.
        prefer: the fastest settings that are allowed.

    Raises:
        ValueError: prefer is not one of `PREFERENCES`, or the budget is not positive.
    """
    check_prefer(prefer)
    if budget_bytes is not None and budget_bytes < 1:
        raise ValueError(f"budget_bytes must be >= 1, got {budget_bytes}")
    request = replace(request, sizes=models.denoiser)
    first = PREFERENCES.index(prefer)

    def fits(stage: Stage) -> bool:
        return budget_bytes is None or stage.least_bytes <= budget_bytes

    def first_fitting(ways: tuple[Stage, ...]) -> int:
        return next((n for n in range(first, len(ways)) if fits(ways[n])), len(ways) - 1)

    called = replace(request, batch=request.batch * run.prompts)
    denoise = {
        choice: with_least(stage, run.least_need_bytes).within(budget_bytes)
        for choice, stage in denoise_stages(
            models, called, prefer=prefer, is_plain=run.is_plain
        ).items()
    }
    chosen = min(
        [choice for choice, stage in denoise.items() if fits(stage)] or [DENOISER_CHOICES[-1]],
        key=lambda choice: (denoise[choice].step_seconds(budget_bytes), denoise[choice].need_bytes),
    )
    stages = []
    if run.has_text:
        stages.append(text_within(models, request.text_tokens, budget_bytes, run=run))
    decode = vae_stages(models, request) if run.has_decode else ()
    encode = vae_stages(models, request, is_decode=False) if run.has_encode else ()
    chosen_vae = max(
        (first_fitting(stages) for stages in (decode, encode) if stages), default=first
    )
    if encode:
        stages.append(encode[chosen_vae])
    stages.append(denoise[chosen])
    if decode and run.has_lean_vae:
        stages.append(decode[chosen_vae])
    elif decode:
        stages.append(vae_stage(models, request, None))
    return Fit(models, request, run, budget_bytes, prefer, tuple(stages), chosen)


def text_within(models: Models, tokens: int, budget_bytes: int | None, *, run: Run) -> Stage:
    """The encoding of a prompt; the embedding table waits in RAM where not all weights fit."""
    whole = text_stage(models, tokens, is_limited=run.has_clip)
    can_gather = run.has_clip and models.text_table_bytes > 0
    if not can_gather or not whole.streamed_bytes(budget_bytes):
        return whole
    return text_stage(models, tokens, is_limited=True, gathers_rows=True)


def with_least(stage: Stage, need_bytes: int) -> Stage:
    """The stage with at least that need."""
    workspace = max(stage.workspace_bytes, need_bytes - stage.activation_bytes)
    return replace(stage, workspace_bytes=workspace)


@dataclass(frozen=True)
class Alternative:
    """What would fit instead of a plan that does not.

    differs_in: a smaller batch, a smaller picture, or transformer and text encoder in fp8.
    request: what fits.
    """

    differs_in: Literal["batch", "size", "fp8"]
    request: Request


def alternatives(plan: Fit) -> Iterator[Alternative]:
    """What would fit the budget instead; empty for a plan that fits."""
    if plan.verdict == "fits":
        return
    wanted, models = plan.request, plan.models

    def fits(request: Request, of: Models = models) -> bool:
        smallest = fit(of, request, plan.budget_bytes, prefer="smallest", run=plan.run)
        return smallest.verdict == "fits"

    if wanted.batch > 1:
        batch = largest(wanted.batch - 1, lambda count: fits(replace(wanted, batch=count)))
        if batch:
            yield Alternative("batch", replace(wanted, batch=batch))
    longer = max(wanted.width_px, wanted.height_px)

    def scaled(steps: int) -> Request:
        width, height = (
            max(STEP_PX, side * steps * STEP_PX // longer // STEP_PX * STEP_PX)
            for side in (wanted.width_px, wanted.height_px)
        )
        return replace(wanted, width_px=width, height_px=height)

    steps = largest((longer - 1) // STEP_PX, lambda steps: fits(scaled(steps)))
    if steps:
        yield Alternative("size", scaled(steps))
    in_fp8 = replace(
        models,
        denoiser_weight_bytes=_in_fp8(models.denoiser_weight_bytes, models.denoiser.parameters),
        text_weight_bytes=_in_fp8(models.text_weight_bytes, QWEN3_4B.parameters),
        text_table_bytes=_in_fp8(models.text_table_bytes, QWEN3_4B.table),
    )
    if in_fp8 != models and fits(wanted, in_fp8):
        yield Alternative("fp8", wanted)


def _in_fp8(weight_bytes: int, parameters: int) -> int:
    """A model's weights in fp8. LoRAs, the bytes beyond 2 a parameter, keep their size."""
    return min(weight_bytes, parameters + max(0, weight_bytes - 2 * parameters))


def largest(last: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `last` that fits, or 0; all numbers below it must fit."""
    return bisect(range(1, last + 1), False, key=lambda number: not fits(number))
