"""The host's Train LoRA node."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def train_lora(
    model: Any, latents: torch.Tensor, positive: list[Any], **options: Any
) -> dict[str, torch.Tensor]:
    """What two steps train; every input is a list, as the host hands it."""
    from comfy_extras.nodes_train import TrainLoraNode

    given = {
        "model": model,
        "latents": {"samples": latents},
        "positive": positive,
        "batch_size": 1,
        "grad_accumulation_steps": 1,
        "steps": 2,
        "learning_rate": 1e-2,
        "rank": 2,
        "optimizer": "SGD",
        "loss_function": "MSE",
        "seed": 1,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "quantized_backward": False,
        "algorithm": "LoRA",
        "gradient_checkpointing": False,
        "checkpoint_depth": 2,
        "offloading": False,
        "existing_lora": "[None]",
        "bucket_mode": False,
        "bypass_mode": False,
        **options,
    }
    known = inspect.signature(TrainLoraNode.execute).parameters
    torch.manual_seed(7)
    result = TrainLoraNode.execute(**{k: [v] for k, v in given.items() if k in known}).args
    lora = next(r for r in result if isinstance(r, dict) and "loss" not in r)
    assert len(lora) > 20
    return lora
