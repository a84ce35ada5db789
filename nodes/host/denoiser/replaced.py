"""What lean blocks have in common: they stand for a block of the host under its own forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import comfy.model_management
import torch
import torch.utils.checkpoint
from torch import nn

OnHandover = Callable[[str], None]
F = TypeVar("F", bound=Callable[..., Any])
# Patches inside a block get q, k and v, or what they attended to, whole.
OF_ATTENTION = ("attn1_patch", "attn1_output_patch")
# Why a part that takes its samples one by one cannot run.
ONE_TIME = "several samples share one timestep"


def eager(function: F) -> F:
    """Keeps torch.compile out of a function, which then runs between the compiled parts.

    It would unroll the loops over chunks into a graph that writes into views of its own inputs,
    which it cannot build.
    """
    return cast(F, torch.compiler.disable(function))


def is_stock(part: Any, kind: type) -> bool:
    """True for a part of the host's class without hooks and without a forward of its own."""
    return (
        type(part) is kind
        and getattr(part.forward, "__func__", None) is kind.forward
        and not part._forward_hooks
        and not part._forward_pre_hooks
    )


class Replaced(nn.Module):
    """Replaces a block in a patched model.

    Its layers are the block's own, so weights, LoRA and offload find them by name.

    stock: the block, in a tuple, so that it is no submodule and its weights count once.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        # Shared, so that a weight or a layer that is patched here is the block's too.
        self._parameters, self._modules = block._parameters, block._modules
        self.stock = (block,)

    def named_modules(self, memo=None, prefix="", remove_duplicate=True):
        """With the block, so that the host's Train LoRA takes its checkpointing off it again."""
        yield from super().named_modules(memo, prefix, remove_duplicate)
        yield f"{prefix}.stock", self.stock[0]  # its layers are this module's


class LeanPart(Replaced):
    """Replaces a part whose known calls `run` computes in pieces.

    Calls that are not known go to the part as they are, with a reason.

    STREAMS: the arguments that are residual streams. KNOWN: the others that `run` reads.
    """

    STREAMS: tuple[str, ...]
    KNOWN: tuple[str, ...]

    def __init__(self, block: Any, on_handover: OnHandover) -> None:
        super().__init__(block)
        for name, value in vars(block).items():
            # Not what is the part's own: another node's clone may have put a forward on the block.
            if (
                not name.startswith("_")
                and name not in vars(self)
                and not hasattr(type(self), name)
            ):
                setattr(self, name, value)
        self._on_handover = on_handover

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        """Why the part itself has to run, in a few words."""
        if comfy.model_management.in_training:
            return "a training runs"
        for name, value in given.items():
            if name not in (*self.STREAMS, *self.KNOWN) and value is not None:
                return f"the request has {name}"
        patches = (given.get("transformer_options") or {}).get("patches", {})
        for kind in OF_ATTENTION:
            if patches.get(kind):
                return f"another node patches the attention ({kind})"
        return None

    def run(self, **given: Any) -> Any:
        """What the part computes; arguments by their names."""
        raise NotImplementedError

    def with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        """What the part computes where gradients are recorded."""
        raise NotImplementedError

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (block,) = self.stock
        bound = inspect.signature(block.forward).bind(*args, **kwargs)
        given = bound.arguments
        if self._has_gradient(given):
            return self.with_gradients(*args, **kwargs)
        why = self.why_not(given)
        if why is not None:
            self._on_handover(why)
            return block(*args, **kwargs)
        return self.run(**given)

    def _has_gradient(self, given: Mapping[str, Any]) -> bool:
        if not torch.is_grad_enabled():
            return False
        tensors = (t for t in given.values() if isinstance(t, torch.Tensor))
        return any(t.requires_grad for t in (*tensors, *self.parameters()))


class LeanForward:
    """Replaces the forward of one layer for one call of the denoiser; see forwards.py.

    Known calls are computed in pieces by `run`. The layer stays in its place: the host loads,
    offloads and patches layers with weights of their own by their names and attributes. Calls that
    are not known go to the layer's own forward, with a reason; with gradients they go there too.
    """

    def __init__(self, layer: Any, on_handover: OnHandover) -> None:
        self.layer, self._on_handover = layer, on_handover

    def why_not(self, x: torch.Tensor) -> str | None:
        """Why the layer's own forward has to run, in a few words."""
        return "a training runs" if comfy.model_management.in_training else None

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """What the layer computes."""
        raise NotImplementedError

    @eager
    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        is_known = isinstance(x, torch.Tensor) and not (args or kwargs)
        if not (is_known and torch.is_grad_enabled() and self._has_gradient(x)):
            why = self.why_not(x) if is_known else "another node calls a layer"
            if why is None:
                return self.run(x)
            self._on_handover(why)
        return type(self.layer).forward(self.layer, x, *args, **kwargs)

    def _has_gradient(self, x: torch.Tensor) -> bool:
        return any(t.requires_grad for t in (x, *self.layer.parameters()))


class InPlace(LeanPart):
    """For parts of the host that write over their streams, and return them. `run` does so too.

    With gradients they go to the part as they are: under torch.utils.checkpoint, what it saves
    would be written over unnoticed.
    """

    def with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        (block,) = self.stock
        self._on_handover("gradients are on")
        return block(*args, **kwargs)


class IntoNew(LeanPart):
    """For parts of the host that make new streams. `run` does so too.

    With gradients the part runs under torch.utils.checkpoint, so that its activations are computed
    again in the backward pass.
    """

    def with_gradients(self, *args: Any, **kwargs: Any) -> Any:
        (block,) = self.stock
        if "transformer_options" in kwargs:  # the host writes the place of each block into them
            kwargs["transformer_options"] = dict(kwargs["transformer_options"])
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, **kwargs)
