"""Networks beside the denoiser, which the node leaves as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy.model_patcher import ModelPatcher


def has_controls(model: ModelPatcher, conds: Mapping[str, Sequence[Any]]) -> bool:
    """Whether a prompt has a ControlNet, or a patch of another node a network of its own.

    Args:
        conds: the prompts, as a PREPARE_SAMPLING wrapper gets them.
    """
    has_control = any("control" in cond for prompt in conds.values() for cond in prompt)
    return has_control or bool(model.model_patches_models())


def make_wrapper(on_control: Callable[[], None]) -> Callable[..., Any]:
    """A PREPARE_SAMPLING wrapper; `on_control` is called where a request `has_controls`."""

    def prepare(executor, model, noise_shape, conds, *args, **kwargs):
        if has_controls(model, conds):
            on_control()
        return executor(model, noise_shape, conds, *args, **kwargs)

    return prepare
