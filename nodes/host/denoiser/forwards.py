"""Layers whose own forwards are replaced for one call of the denoiser.

An object patch would not do. It lies over what other nodes put on the layer after our node and
before the host loads the model (as Train LoRA's bypass mode), and the host leaves a `forward` on
the layer when it undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from .block import BlockSettings
from .family import MakeForwardFn
from .replaced import OnHandover, eager


class LayersOfCall:
    """A DIFFUSION_MODEL wrapper that has the layers run in pieces.

    Args:
        forwards: by attributes of the denoiser, see `Family`.
        on_handover: called with the reason, in a few words, where a layer runs as the host's.
    """

    def __init__(
        self,
        forwards: Mapping[str, MakeForwardFn],
        settings: BlockSettings,
        on_handover: OnHandover,
    ) -> None:
        self._forwards, self._settings, self._on_handover = forwards, settings, on_handover

    @eager
    def __call__(self, executor, x, *args, **kwargs):
        with ExitStack() as undo:
            for name, make in self._forwards.items():
                layer = getattr(executor.class_obj, name)
                if getattr(layer.forward, "__func__", None) is not type(layer).forward:
                    self._on_handover(f"another node changed {name}")
                    continue
                undo.callback(_restore, layer, vars(layer).get("forward"))
                layer.forward = make(layer, self._settings, self._on_handover, x.dtype)
            return executor(x, *args, **kwargs)


def _restore(layer: Any, forward: Any) -> None:
    """forward: what the layer had as an attribute of its own; None: nothing."""
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
