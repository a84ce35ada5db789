"""Puts a plan on a model and on a VAE: lean parts, with settings chosen at each call."""

from __future__ import annotations

import logging
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...denoiser.plan import DenoiserChoice
from ...fit.planner import Planner
from ...prefer import PREFERENCES
from ..base.options import OPTIONS_KEY
from ..base.server import NodeLog
from ..denoiser.block import BlockSettings
from ..denoiser.known import mixes_rows_of_calls
from ..denoiser.patch import with_lean_blocks
from ..vae.forward import VaeSettings
from ..vae.patch import with_lean_vae
from . import budget
from .enforcer import Enforcer

NAME = "Fit to VRAM"
_KEY = f"{OPTIONS_KEY}.fit_to_vram"


def with_plan(model: ModelPatcher, planner: Planner, node_id: str | None) -> ModelPatcher:
    """A clone with lean blocks, whose samplings are planned and kept within the budget."""
    enforcer = Enforcer(planner, NodeLog(NAME, node_id))
    # What each sampling's plan adds saves memory from there.
    settings = BlockSettings(planner.request.sizes, DenoiserChoice(PREFERENCES[0]))
    patched = with_lean_blocks(
        model,
        settings,
        blocks="all",
        prepare=enforcer.prepare,
        node_id=node_id,
        mixes_rows=mixes_rows_of_calls(model),
    )
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, _KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, enforcer.outer_sample)
    return patched


def with_planned_vae(vae: Any, planner: Planner, node_id: str | None) -> Any:
    """A VAE that chooses at each call what fits; the same VAE if it must stay stock."""
    settings = VaeSettings(
        choose=lambda call, device: planner.vae_choice(call, budget.room_bytes(device)),
        budget=planner.named_bytes or None,
    )
    lean, reason = with_lean_vae(vae, settings, NodeLog("Lean VAE", node_id))
    if reason is not None:
        NodeLog(NAME, node_id=None).say(f"the VAE is left unchanged: {reason}", logging.WARNING)
    return lean
