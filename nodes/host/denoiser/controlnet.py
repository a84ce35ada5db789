"""The blocks of Z-Image Fun ControlNets, lean for one forward of the denoiser.

The host's patch runs the ControlNet's blocks between ours. They are blocks of the same class, so
`run_block` runs them too. Nothing that outlives the forward is changed: it calls shallow copies of
the patch and of the ControlNet.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.ldm.lumina.controlnet as controlnet
import comfy.ldm.lumina.model as lumina
import torch

from ...denoiser.cuts import DenoiserPlan
from ...denoiser.sizes import ControlSizes
from .block import is_untouched, run_block
from .heads import views_of

# The host loads its node files under their paths, so that their classes cannot be imported.
PATCH, PATCH_MODULE = "ZImageControlPatch", "nodes_model_patch"
# What the patch keeps from one forward to the next.
KEPT = ("encoded_image", "encoded_image_size")
# What the ControlNet gives to its blocks beside their streams.
ARGUMENTS = ("x_mask", "freqs_cis", "adaln_input")
PlanOf = Callable[[torch.Tensor], DenoiserPlan]


def control_sizes(transformer_options: Mapping[str, Any]) -> tuple[ControlSizes, ...]:
    """The sizes of the ControlNets of a request."""
    nets = [patch.model_patch.model for patch in _control_patches(transformer_options)]
    return tuple(
        ControlSizes(
            layers=net.n_control_layers,
            is_refining=net.refiner_control,
            is_doubled=net.refiner_control and net.broken,
            channels=net.control_in_dim + net.additional_in_dim,
        )
        for net in nets
    )


@contextmanager
def lean_controls(transformer_options: dict[str, Any], plan_of: PlanOf) -> Iterator[dict[str, Any]]:
    """The options of a request with lean ControlNets, for one forward.

    All other patches, and ControlNets that another node changed, are as they were.

    Args:
        plan_of: how to cut, for a control stream [B, N, D].
    """
    found = [patch for patch in _control_patches(transformer_options) if _can_be_lean(patch)]
    if not found:
        yield transformer_options
        return
    lean = {id(patch): _lean_patch(patch, plan_of) for patch in found}
    patches = {
        kind: [lean.get(id(patch), patch) for patch in listed]
        for kind, listed in transformer_options["patches"].items()
    }
    try:
        yield {**transformer_options, "patches": patches}
    finally:
        for patch in found:
            for name in KEPT:
                setattr(patch, name, getattr(lean[id(patch)], name))


def _control_patches(transformer_options: Mapping[str, Any]) -> list[Any]:
    """Each of the host's patches of Z-Image Fun ControlNets, once."""
    kinds = transformer_options.get("patches", {}).values()
    patches = {id(patch): patch for listed in kinds for patch in listed}
    return [patch for patch in patches.values() if _is_control_patch(patch)]


def _is_control_patch(patch: Any) -> bool:
    kind = type(patch)
    is_hosts = kind.__name__ == PATCH and kind.__module__.endswith(PATCH_MODULE)
    return is_hosts and type(patch.model_patch.model) is controlnet.ZImage_Control


def _can_be_lean(patch: Any) -> bool:
    if torch.is_grad_enabled():
        return False
    control = patch.model_patch.model
    blocks = (*control.control_layers, *control.control_noise_refiner)
    return all(is_untouched(block, _kind_of(block)) for block in blocks)


def _kind_of(block: Any) -> type:
    """The class of the host that a block of a ControlNet should have."""
    makes_skip = hasattr(block, "after_proj")
    return controlnet.ZImageControlTransformerBlock if makes_skip else lumina.JointTransformerBlock


def _lean_patch(patch: Any, plan_of: PlanOf) -> Any:
    control = copy.copy(patch.model_patch.model)
    # A shallow copy of a module shares the table of its children with the module.
    children = vars(control)["_modules"] = dict(control._modules)
    for name in ("control_layers", "control_noise_refiner"):
        setattr(control, name, [_lean_block(block, plan_of) for block in children.pop(name)])
    # A hint that is encoded in this forward comes in RAM; the host moves the patch's alone.
    control._forward_pre_hooks = OrderedDict(control._forward_pre_hooks)
    control.register_forward_pre_hook(_with_hint_here)
    lean = copy.copy(patch)
    # Stands for the ModelPatcher, which the patch asks for its model alone. A copy of that would
    # unload the model at its end.
    lean.model_patch = torch.nn.Module()
    lean.model_patch.model = control
    lean.temp_data = None  # a cancelled forward of the host leaves its control stream there
    return lean


def _with_hint_here(control: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of ZImage_Control.forward: text, hint, rotary table and time."""
    text, hint, table, *rest = args
    return text, hint.to(table.device), table, *rest


def _lean_block(block: Any, plan_of: PlanOf) -> Callable[..., Any]:
    function = _refine if _kind_of(block) is lumina.JointTransformerBlock else _control
    return functools.partial(function, block, plan_of)


def _control(
    block: Any, plan_of: PlanOf, stream: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ZImageControlTransformerBlock: what is added to the picture, and the control stream."""
    if args or set(kwargs) != set(ARGUMENTS) or kwargs["x_mask"] is not None:
        return block(stream, x, *args, **kwargs)
    if block.block_id == 0:
        is_alike = stream.shape == x.shape
        stream = torch.add(block.before_proj(stream), x, out=stream if is_alike else None)
    stream = _updated(block, plan_of, stream, kwargs["freqs_cis"], kwargs["adaln_input"])
    return block.after_proj(stream), stream


def _refine(
    block: Any, plan_of: PlanOf, stream: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """As JointTransformerBlock, of the control stream."""
    if kwargs or len(args) != len(ARGUMENTS) or args[0] is not None:
        return block(stream, *args, **kwargs)
    return _updated(block, plan_of, stream, *args[1:])


def _updated(
    block: Any,
    plan_of: PlanOf,
    stream: torch.Tensor,
    table: torch.Tensor,
    adaln_input: torch.Tensor,
) -> torch.Tensor:
    """The control stream after a block, [B, N, D]; written over the one before where they fit.

    The one before was made in this forward, by the embedder or by another block. Only the copy of
    the patch holds it, and lets go of it for what this returns.
    """
    (batch,) = torch.broadcast_shapes(stream.shape[:1], adaln_input.shape[:1])
    source = target = stream
    if batch > len(stream):  # one hint for all pictures: their streams differ from here on
        source, target = stream.expand(batch, -1, -1), stream.new_empty(batch, *stream.shape[1:])
    run_block(
        block,
        source,
        target,
        rope=views_of(table),
        adaln_input=adaln_input.expand(batch, -1),
        transformer_options={},  # the host gives none
        plan=plan_of(source),
    )
    return target
