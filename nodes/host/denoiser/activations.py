"""Feed-forwards of the host: which layers they are made of, and what activates the hidden rows."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any, NamedTuple

import comfy.ldm.flux.layers as layers
import torch
from torch import nn
from torch.nn import functional

from ...denoiser.cuts import DenoiserPlan
from ...denoiser.mlp import ActivationFn, Hidden
from ...denoiser.rows import Columns, Projection
from .projections import cut_projection
from .replaced import is_stock


class Activation(NamedTuple):
    """What an activation does in place, and whether it multiplies two halves of its rows."""

    apply_: ActivationFn
    is_gated: bool


def activation_of(module: Any) -> Activation | None:
    """None for one that is not known."""
    if type(module) is layers.SiLUActivation:
        return Activation(functools.partial(functional.silu, inplace=True), True)
    if type(module) is nn.SiLU:
        return Activation(functools.partial(functional.silu, inplace=True), False)
    if type(module) is nn.GELU and module.approximate == "tanh":
        return Activation(functools.partial(torch.ops.aten.gelu_, approximate="tanh"), False)
    return None


class FeedForward(NamedTuple):
    """The layers of a feed-forward; where one gives both factors, there is no `second`."""

    first: Any
    second: Any | None
    out: Any
    activation: Activation

    def fetched(
        self, like: torch.Tensor, until: ExitStack, plan: DenoiserPlan
    ) -> tuple[Hidden, Projection]:
        """Its hidden rows and the projection of them; arguments as `cut_projection`."""
        first, out = (cut_projection(layer, like, until, plan) for layer in (self.first, self.out))
        width, second = self.out.in_features, None
        if self.second is not None:
            second = Columns(cut_projection(self.second, like, until, plan))
        elif self.activation.is_gated:
            second = Columns(first, width)
        return Hidden(width, Columns(first), second, self.activation.apply_), out


def feed_forward_of(mlp: Any) -> FeedForward | None:
    """Of a DoubleStreamBlock; None for one that is not known."""
    if type(mlp) is layers.YakMLP:
        known, first, second, out = mlp.act_fn, mlp.gate_proj, mlp.up_proj, mlp.down_proj
    elif type(mlp) is nn.Sequential and len(mlp) == 3:
        (first, known, out), second = mlp, None
    else:
        return None
    activation = activation_of(known)
    return None if activation is None else FeedForward(first, second, out, activation)


def is_stock_feed_forward(mlp: Any) -> bool:
    """True for one without hooks and without replaced forwards; its linear layers may have both."""
    activation = mlp.act_fn if type(mlp) is layers.YakMLP else mlp[1]
    return is_stock(mlp, type(mlp)) and is_stock(activation, type(activation))
