"""What comes before and after Wan's blocks, and what all three have in common."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import comfy.ldm.wan.model as wan
import comfy.model_management
import comfy.ops
import torch
from torch.nn import functional

from ...cuts import pieces
from ...denoiser.cuts import CHUNK_MULTIPLE, DenoiserPlan, chunks
from ...denoiser.rows import Shift
from ...denoiser.stream import Factors, Stream
from ..base.fetch import fetch_layer_norm, fetch_weights
from .block import BlockSettings
from .projections import projection
from .replaced import ONE_TIME, IntoNew, LeanForward, OnHandover, is_stock

# Of the first layer: as it is, and with weights that are cast.
CONVOLUTIONS = (comfy.ops.disable_weight_init.Conv3d, comfy.ops.manual_cast.Conv3d)


def runs_of(factors: torch.Tensor, tokens: int) -> list[tuple[int, int, torch.Tensor]]:
    """Runs of tokens, and the factors of each, as the host's repeat_e.

    Args:
        factors: [N, ...], of as many runs of equal length; the last may be short.
    """
    count = factors.shape[0]
    length = tokens // count if tokens % count == 0 else tokens // count + 1
    begins = range(0, tokens, length)
    return [(b, min(tokens, b + length), factors[i]) for i, b in enumerate(begins)]


def is_by_token(factors: torch.Tensor, tokens: int) -> bool:
    """True where the runs are too short to be worth a call each."""
    return factors.ndim > 3 and 1 < factors.shape[1] > tokens // CHUNK_MULTIPLE


class LeanWan(IntoNew):
    """What the parts have in common."""

    def __init__(self, block: Any, settings: BlockSettings, on_handover: OnHandover) -> None:
        super().__init__(block, on_handover)
        self.settings = settings

    def plan(self, x: torch.Tensor, options: Mapping[str, Any]) -> DenoiserPlan:
        return self.settings.plan_for(x.shape[0], (x.shape[1],), x.device, options)

    def modulated(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """What modulates each run of tokens, [B, N, factors, D]."""
        (block,) = self.stock
        own = comfy.model_management.cast_to(block.modulation, dtype=x.dtype, device=x.device)
        return own.unsqueeze(0) + e


class LeanHead(LeanWan):
    """The last layer in chunks of tokens."""

    STREAMS = ("x",)
    KNOWN = ("e",)

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        if not is_stock(self.stock[0], wan.Head):
            return "another node changed a block"
        if len(given["e"]) != len(given["x"]):
            return ONE_TIME
        if given["e"].ndim == 3 and is_by_token(given["e"].unsqueeze(2), given["x"].shape[1]):
            return "each token has its own modulation"
        return super().why_not(given)

    def run(self, *, x, e, **_) -> torch.Tensor:
        (layer,) = self.stock
        plan = self.plan(x, {})
        factors = self.modulated(x, (e if e.ndim == 3 else e.unsqueeze(1)).unsqueeze(2))
        made = x.new_empty(*x.shape[:2], layer.head.out_features)
        with ExitStack() as until:
            norm = fetch_layer_norm(layer.norm, x, until)
            linear = projection(layer.head, x, until)
            for sample, rows in enumerate(x):
                runs = [
                    Factors(begin, end, Shift(1 + f[1], f[0]), None)
                    for begin, end, f in runs_of(factors[sample], x.shape[1])
                ]
                stream = Stream(rows, rows, norm, runs)
                for start, stop in chunks(x.shape[1], plan.chunk_tokens):
                    made[sample, start:stop] = linear(stream.modulated(start, stop))
        return made


class LeanPatches(LeanForward):
    """The first layer, a few frames at a time.

    It multiplies in float32, and the host rounds its result. Here each frame's result is rounded
    at once, so that three streams do not live together.
    """

    def __init__(
        self, layer: Any, settings: BlockSettings, on_handover: OnHandover, dtype: torch.dtype
    ) -> None:
        super().__init__(layer, on_handover)
        self.settings, self.dtype = settings, dtype

    def why_not(self, x: torch.Tensor) -> str | None:
        layer = self.layer
        if type(layer) not in CONVOLUTIONS or "forward_comfy_cast_weights" in vars(layer):
            return "another node changed the first layer"
        is_by_frame = layer.kernel_size == layer.stride and layer.kernel_size[0] == 1
        if not is_by_frame or any(layer.padding) or layer.groups > 1:
            return "a token has several frames"
        if x.dtype != torch.float32:
            return "another node calls the first layer"
        return super().why_not(x)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        batch, _, frames, *sides = x.shape
        height, width = (side // step for side, step in zip(sides, layer.stride[1:], strict=True))
        plan = self.settings.plan_for(batch, (frames * height * width,), x.device)
        made = torch.empty(
            (batch, layer.out_channels, frames, height, width),
            dtype=self.dtype,
            device=x.device,
        )
        with ExitStack() as until:
            weight, bias = fetch_weights(layer, x, until)
            for start, stop in pieces(frames, max(1, plan.chunk_tokens // (height * width))):
                part = functional.conv3d(x[:, :, start:stop], weight, bias, layer.stride)
                made[:, :, start:stop] = part
                del part  # before the next frames' result is allocated
        return made
