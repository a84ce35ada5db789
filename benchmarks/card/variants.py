"""The ways in which a sampling is measured: the host alone, and each setting of our nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

HOST = "ComfyUI"
DEFAULT = "Apply Gradient Checkpoint"
SPEED, SMALLEST = f"{DEFAULT} speed", f"{DEFAULT} smallest"


def checkpoint(model: Any, prefer: str = "balance") -> Any:
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    return ApplyGradientCheckpoint.execute(model, prefer=prefer).args[0]


def sliced(model: Any, mode: str) -> Any:
    from pack.nodes.attention_slice import AttentionSlice

    return AttentionSlice.execute(checkpoint(model), mode).args[0]


def fit(model: Any, prefer: str) -> Any:
    from pack.nodes.fit_to_vram import FitToVRAM

    return FitToVRAM.execute(model, prefer=prefer).args[0]


def lean_vae(vae: Any, prefer: str = "balance") -> Any:
    """The VAE in strips; the VAE itself where the node leaves it."""
    from pack.nodes.lean_vae import LeanVAE

    with torch.inference_mode():
        return LeanVAE.execute(vae, prefer).args[0]


# Name -> what makes the patched model of the host's; the order is that of the tables.
DENOISER: dict[str, Callable[[Any], Any]] = {
    HOST: lambda model: model,
    SPEED: lambda model: checkpoint(model, "speed"),
    DEFAULT: checkpoint,
    SMALLEST: lambda model: checkpoint(model, "smallest"),
    "+ Attention Slice auto": lambda model: sliced(model, "auto"),
    "+ Attention Slice max": lambda model: sliced(model, "max"),
    "Fit to VRAM speed": lambda model: fit(model, "speed"),
    "Fit to VRAM balance": lambda model: fit(model, "balance"),
    "Fit to VRAM smallest": lambda model: fit(model, "smallest"),
}


def make(name: str, model: Any) -> Any:
    """The model in that way, patched as the host runs nodes: without gradients."""
    with torch.inference_mode():
        return DENOISER[name](model)
