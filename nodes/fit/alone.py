"""The same run on ComfyUI alone, judged as ours is."""

from __future__ import annotations

from dataclasses import replace

from .stage import Stage
from .stages import stock_denoise_stage, text_stage, vae_stage
from .what_fits import Fit, with_least


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
        stages.append(replace(text, setting="ComfyUI's own"))
    if run.has_encode:
        stages.append(_judged(vae_stage(models, request, None, is_decode=False)))
    stages.append(with_least(stock_denoise_stage(models, called), run.least_need_bytes))
    if run.has_decode:
        stages.append(_judged(vae_stage(models, request, None)))
    return replace(plan, stages=tuple(stages))


def _judged(stage: Stage) -> Stage:
    return replace(stage, is_judged=True)
