"""The same run on ComfyUI alone, judged as ours is, and what each needs at least."""

from __future__ import annotations

from dataclasses import replace

from ..denoiser.plan import DenoiserChoice
from ..denoiser.sizes import Request
from ..prefer import Prefer
from .stage import Stage
from .stages import ALONE, Models, denoise_stages, stock_denoise_stage, text_stage, vae_stage
from .what_fits import WHOLE_RUN, Fit, fit, text_within, with_least


def alone(plan: Fit) -> Fit:
    """The plan of the same run without our nodes, within the same budget.

    ComfyUI streams the weights that do not fit, as under dynamic VRAM, and gets the same allowance
    for workspaces. It decodes the whole picture: its fallback to tiles makes another picture, so a
    decode that does not fit is judged too large. `choice` and `prefer` remain those of the plan.
    """
    models, request, run = plan.models, plan.request, plan.run
    called = replace(request, batch=request.batch * run.prompts)
    stages = []
    if run.has_text:
        text = text_stage(models, request.text_tokens)
        stages.append(replace(text, setting=ALONE))
    if run.has_encode:
        stages.append(_judged(vae_stage(models, request, None, is_decode=False)))
    stages.append(with_least(stock_denoise_stage(models, called), run.least_need_bytes))
    if run.has_decode:
        stages.append(_judged(vae_stage(models, request, None)))
    return replace(plan, stages=tuple(stages))


def _judged(stage: Stage) -> Stage:
    return replace(stage, is_judged=True)


def least_stage(models: Models, request: Request, prefer: Prefer | None) -> Stage:
    """The stage of a whole run that needs the most VRAM where weights are streamed from RAM.

    Its `least_bytes` are the smallest card on which the run fits.

    Args:
        prefer: of all our nodes, with the settings that each begins at; None: ComfyUI alone.
    """
    if prefer is None:
        stages = alone(fit(models, request, 1)).stages
    else:
        stages = (
            text_within(models, request.text_tokens, 1, run=WHOLE_RUN),
            denoise_stages(models, request)[DenoiserChoice(prefer)],
            vae_stage(models, request, prefer),
        )
    return max(stages, key=lambda stage: stage.least_bytes)
