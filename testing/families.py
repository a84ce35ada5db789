"""Other families' transformers at full width on fake tensors: the host's classes, exact bytes.

As testing/stock_forward.py does for Z-Image. A few blocks of each kind stand for all of them, which
peak alike. The caller's tensors count as allocations; the weights do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from pack.testing.published_families import BLOCKS, CALLS, FAMILIES, Call, Family
from pack.testing.stock_forward import (
    QUANTISED,
    FakeModel,
    Route,
    Weights,
    installed,
    quantise,
)
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = [
    "BLOCKS", "CALLS", "FAMILIES", "Call", "FakeFamily", "Family", "build", "fake_device",
    "latent_shape", "measure", "stream_bytes",
]  # fmt: skip


def fake_device() -> torch.device:
    """A card, where torch is built for one."""
    return torch.device("cuda" if torch.backends.cuda.is_built() else "cpu")


def build(
    family: Family,
    *,
    dtype: torch.dtype,
    device: torch.device,
    is_mixed: bool = False,
    stored: torch.dtype | None = None,
    **changed: Any,
) -> Any:
    """The host's BaseModel; `changed` entries of its configuration differ.

    Args:
        is_mixed: with the layers of checkpoints that have quantised ones.
        stored: the dtype of the weights; None: that of the activations.
    """
    import comfy.ops
    import comfy.supported_models

    config = {**family.config, **changed}
    model_config = getattr(comfy.supported_models, family.supported)(config)
    model_config.set_inference_dtype(stored or dtype, None if stored is None else dtype)
    if is_mixed:
        model_config.custom_operations = comfy.ops.mixed_precision_ops({}, dtype)
    return model_config.get_model({}, "", device=device)


def latent_shape(family: Family, call: Call) -> tuple[int, ...]:
    """[B, C, H, W]; [B, C, F, H, W] where the family has frames."""
    sides = (call.height_px // family.latent_px, call.width_px // family.latent_px)
    frames = (1 + (call.frames - 1) // family.frames,) if family.frames else ()
    return (call.batch, family.channels, *frames, *sides)


def stream_bytes(family: Family, call: Call, dtype: torch.dtype = torch.bfloat16) -> int:
    """U: bytes of one residual stream. A text that is only attended to is not part of it."""
    *_, height, width = latent_shape(family, call)
    frames = math.prod(latent_shape(family, call)[2:-2])
    scale = family.cell // family.latent_px
    tokens = frames * (height // scale) * (width // scale) * (1 + call.references)
    joined = call.text_tokens if family.joins_text else 0
    return call.batch * (tokens + joined) * family.dim * dtype.itemsize


# Kinds of weights on the card, by what users have: the host's format, and whether the card
# multiplies such numbers.
ON_CARD = {
    "scaled fp8": ("float8_e4m3fn", True),
    "scaled fp8 without fp8 products": ("float8_e4m3fn", False),
    "int8 file": ("int8_tensorwise", True),
    "nvfp4": ("nvfp4", True),
}  # fmt: skip
WEIGHT_DTYPE, FOREIGN = "weight_dtype fp8_e4m3fn", "GGUF-like"
KINDS = (*ON_CARD, WEIGHT_DTYPE, FOREIGN)


class Foreign(torch.nn.Linear):
    """A layer of another pack, which copies its whole weight in each call."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        stored = layer.weight.to(torch.float8_e4m3fn)
        self.weight, self.bias = torch.nn.Parameter(stored, requires_grad=False), layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(input, self.weight.to(input.dtype), self.bias)


def _of_blocks(path: str) -> bool:
    """What is in fewer bits in files: the layers of the blocks."""
    return "_blocks." in path or path.startswith("blocks.")


def _make_foreign(transformer: torch.nn.Module) -> None:
    for path, layer in list(transformer.named_modules()):
        if _of_blocks(path) and isinstance(layer, torch.nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(transformer.get_submodule(parent), name, Foreign(layer))


class FakeFamily(FakeModel):
    """The host's BaseModel of a family with fake weights, as `FakeDenoiser` is Z-Image's.

    Args:
        weights: "plain", one of `KINDS`, or "streamed" or "int8" as `FakeDenoiser` has them.
        changed: see `build`.
    """

    def __init__(
        self,
        family: Family,
        *,
        dtype: torch.dtype = torch.bfloat16,
        weights: Weights | str = "plain",
        changed: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.family, self.dtype = family, dtype
        self.device, self.mode = fake_device(), FakeTensorMode()
        is_in_ram = weights in ("streamed", "int8")
        device = torch.device("cpu") if is_in_ram else self.device
        with self.mode, device:
            found = ON_CARD.get(weights)
            quantised, multiplies = found or (QUANTISED.get(weights), False)
            self.model = build(
                family,
                dtype=dtype,
                device=device,
                is_mixed=quantised is not None,
                stored=torch.float8_e4m3fn if weights == WEIGHT_DTYPE else None,
                **changed,
            )
            transformer = self.model.diffusion_model
            if quantised:
                quantise(transformer, quantised, dtype, _of_blocks, multiplies=multiplies)
            elif weights == FOREIGN:
                _make_foreign(transformer)
        for layer in self.model.modules() if is_in_ram else ():
            if hasattr(layer, "comfy_cast_weights"):  # as the host's ModelPatcher.load sets it
                layer.comfy_cast_weights = True

    def measure(
        self,
        call: Call,
        *,
        patcher: Any = None,
        route: Route = "model",
        around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda called: called,
        **tracking: Any,
    ) -> Tracker:
        """Runs one forward of the transformer as in sampling, and returns what it held.

        Args:
            patcher, route, around: as for `FakeDenoiser.measure`.
            tracking: options of Tracker; attention is "flash" unless named.
        """
        family, dtype, batch = self.family, self.dtype, call.batch
        tracker = Tracker(**{"attention": "flash", "on": self.device.type, **tracking})
        with (
            torch.inference_mode(),
            installed(self.patcher() if patcher is None else patcher) as options,
            self.mode,
            self.device,
        ):
            shape = latent_shape(family, call)
            is_model = route == "model"
            called = self.model.diffusion_model if is_model else self.model.apply_model
            kept = dtype if is_model else torch.float32
            given = [torch.empty(shape, dtype=kept), torch.empty(batch, dtype=kept)]
            text = torch.empty(batch, call.text_tokens, family.text, dtype=dtype)
            more: dict[str, Any] = {
                name: torch.empty((batch, width) if width else batch, dtype=dtype)
                for name, width in family.inputs.items()
            }
            if call.references:
                made = [torch.empty(shape, dtype=dtype) for _ in range(call.references)]
                more["ref_latents"] = made
            more["context" if is_model else "c_crossattn"] = text
            with tracker:
                tracker.watch(*given, text, *more.get("ref_latents", ()))
                around(called)(*given, **more, transformer_options=options)
        return tracker


def measure(
    family: Family,
    call: Call,
    *,
    dtype: torch.dtype = torch.bfloat16,
    weights: Weights | str = "plain",
    changed: Mapping[str, Any] = MappingProxyType({}),
    patched: Callable[[Any], Any] = lambda patcher: patcher,
    **tracking: Any,
) -> Tracker:
    """Runs one forward of a family's transformer as in sampling, and returns what it held.

    Args:
        weights, changed: see `FakeFamily`.
        patched: what nodes make of the ModelPatcher.
        tracking: see `FakeFamily.measure`.
    """
    fake = FakeFamily(family, dtype=dtype, weights=weights, changed=changed)
    return fake.measure(call, patcher=patched(fake.patcher()), **tracking)
