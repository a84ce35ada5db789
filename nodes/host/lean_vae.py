"""A copy of the host's VAE object whose decoder and encoder run in strips of rows."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import comfy.ldm.models.autoencoder as autoencoder
import comfy.model_management
import comfy.utils
import torch
from torch import nn

from . import notice, vae_layers
from .budget import make_room
from .pinned import PinnedRam

logger = logging.getLogger(__name__)

# Multiply-adds below which a progress bar would only flicker, as under each tile of a tiled decode.
_LONG = 2 * 10**12


class Call(NamedTuple):
    """One sample that is to be decoded or encoded.

    sizes: of the module, by the names of memory's VaeSizes.
    height: of the picture, in pixels.
    width: likewise.
    dtype: of the arithmetic.
    device: where to compute.
    """

    sizes: dict[str, Any]
    height: int
    width: int
    dtype: torch.dtype
    device: torch.device


class Choice(Protocol):
    """What was chosen for a call; memory's VaeChoice."""

    def plan(self, call: Call, attempt: int, /) -> Any:
        """After so many attempts that ran out of memory; None if there is no smaller."""
        ...

    def work(self, call: Call, plan: Any, /) -> int:
        """Multiply-adds of a plan."""
        ...

    def need(self, call: Call, /) -> int:
        """Bytes that the host shall reckon with."""
        ...


@dataclass(frozen=True)
class VaeSettings:
    """What the node hands in from the other rooms.

    kernels: the kernels by name: decode, encode and the layer classes.
    choose: the choice for a call; asked once for all its samples and attempts, because what is
        free meanwhile may change it.
    budget: bytes that all models and the need may take together; None for no limit.
    """

    kernels: Any
    choose: Callable[[Call], Choice]
    budget: int | None = None


class LeanForward:
    """The forward of a decoder or encoder, in strips; the host's own where they do not fit."""

    def __init__(
        self, stock: nn.Module, settings: VaeSettings, node_id: str | None, patcher: Any
    ) -> None:
        self.stock, self._settings, self._node_id = stock, settings, node_id
        self._patcher = patcher
        self._said: set[str] = set()

    @property
    def is_decoder(self) -> bool:
        return hasattr(self.stock, "up")

    def __call__(
        self, given: torch.Tensor, output_buffer: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        reason = self._why_not(given, options)
        if reason is not None:
            self._say_once(f"the host's own code runs: {reason}")
            made = self.stock(given, **options)
            return made if output_buffer is None else output_buffer.copy_(made)
        if output_buffer is None:
            shape = self.output_shape(given.shape)
            output_buffer = torch.empty(shape, dtype=given.dtype, device=given.device)
        call = self.call(given.shape, given.dtype, given.device)
        choice = self._settings.choose(call)
        if self._settings.budget is not None:
            taken = choice.need(call) + self._patcher.model_size()
            make_room([self._patcher], taken, self._settings.budget)
        with PinnedRam(given.device) as ram:
            for index in range(given.shape[0]):
                one = slice(index, index + 1)
                self._run(given[one], output_buffer[one], call, choice, ram)
        return output_buffer

    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int]:
        """The shape of the result for samples [B, C, H, W]."""
        height, width = shape[-2:]
        for _ in range(len(self.sizes()["widths"]) - 1):
            height, width = (
                (2 * side if self.is_decoder else side // 2) for side in (height, width)
            )
        return shape[0], self.stock.conv_out.out_channels, height, width

    def sizes(self) -> dict[str, Any]:
        """The module's sizes, by the names of memory's VaeSizes."""
        return vae_layers.sizes(self.stock)

    def call(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Call:
        """One sample of samples [B, C, H, W] of the module's input."""
        if self.is_decoder:
            shape = torch.Size(self.output_shape(shape))
        return Call(self.sizes(), shape[-2], shape[-1], dtype, device)

    def _why_not(self, given: torch.Tensor, options: dict[str, Any]) -> str | None:
        if options:
            return f"it was called with {', '.join(options)}"
        if given.ndim != 4 or min(self.output_shape(given.shape)[-2:]) < 1:
            return f"a tensor of shape {tuple(given.shape)}"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.stock.parameters()):
            return "gradients are wanted"
        return vae_layers.why_not(self.stock)

    def _run(
        self,
        sample: torch.Tensor,
        result: torch.Tensor,
        call: Call,
        choice: Choice,
        ram: PinnedRam,
    ) -> None:
        plan = choice.plan(call, 0)
        for attempt in itertools.count(1):
            following = choice.plan(call, attempt)
            ram.is_used |= any(level.in_ram for level in plan.levels)
            try:
                self._strips(sample, result, plan, choice.work(call, plan))
                return
            except Exception as error:
                if following is None or not _is_oom(error):
                    raise
            # Out of the except block, because the error holds every tensor of the attempt.
            comfy.model_management.soft_empty_cache(True)
            ram.give_back()  # the next strips have another size
            plan = following
            _say(
                self._node_id,
                f"out of memory: tried again with strips of {plan.levels[-1].limit} rows, "
                f"prefer {plan.prefer}",
            )

    def _strips(self, sample: torch.Tensor, result: torch.Tensor, plan: Any, work: int) -> None:
        kernels = self._settings.kernels
        layers = vae_layers.read(self.stock, kernels, sample)

        def write(first: int, rows: torch.Tensor) -> None:
            result[:, :, first : first + rows.shape[2]].copy_(rows)

        run = kernels.decode if self.is_decoder else kernels.encode
        tick = _Progress(work)
        run(sample, layers, plan, device=sample.device, write=write, tick=tick)

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _say(self._node_id, text)


def _say(node_id: str | None, text: str) -> None:
    logger.info("Lean VAE: %s", text)
    notice.show_text(node_id, text)


class _Progress:
    """Moves the running node's bar on long work, and ends it when the user cancels."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._percent = total, 0, 0
        self._bar = comfy.utils.ProgressBar(100) if total > _LONG else None

    def __call__(self, work: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._done += work
        percent = min(100, 100 * self._done // self._total)
        if self._bar is not None and percent > self._percent:
            self._percent = percent
            self._bar.update_absolute(percent)


def with_lean_vae(vae: Any, settings: VaeSettings, node_id: str | None) -> tuple[Any, str | None]:
    """A copy of the VAE that decodes and encodes in strips.

    Args:
        vae: left as it is; the copy shares its weights and its patcher.
        settings: what the other rooms know.
        node_id: the node that is told what happens.

    Returns:
        The copy and None, or the VAE itself and why it cannot.
    """
    model, stock = vae.first_stage_model, _stock_parts(vae)
    reason = _why_not_vae(vae, stock)
    if reason is not None:
        return vae, reason
    lean, changed = copy.copy(vae), copy.copy(model)
    # A shallow copy of a module shares the table of its children with the module.
    vars(changed)["_modules"] = dict(vars(model)["_modules"])
    forwards = {}
    for name, module in stock.items():
        part = copy.copy(module)
        part.forward = forwards[name] = LeanForward(module, settings, node_id, vae.patcher)
        setattr(changed, name, part)
    takes_buffers = _take_buffers(changed, forwards["decoder"])
    lean.first_stage_model = changed
    for name, of_stock in (("decode", "memory_used_decode"), ("encode", "memory_used_encode")):
        estimate = getattr(vae, of_stock)
        estimate = getattr(estimate, "stock", estimate)
        forward = forwards[f"{name}r"]
        need = _Need(estimate, forward, settings, vae, takes_buffers=takes_buffers)
        setattr(lean, of_stock, need)
    return lean, None


def example_call(vae: Any, side: int) -> Call:
    """The decode of a square picture by a VAE that was made here."""
    sizes = vae.first_stage_model.decoder.forward.sizes()
    return Call(sizes, side, side, vae.vae_dtype, vae.device)


def sizes_of(vae: Any) -> dict[str, dict[str, Any]] | None:
    """The sizes of a VAE's decoder and encoder; None for one that stays stock."""
    stock = _stock_parts(vae)
    if _why_not_vae(vae, stock) is not None:
        return None
    return {name: vae_layers.sizes(module) for name, module in stock.items()}


def _stock_parts(vae: Any) -> dict[str, nn.Module | None]:
    model = vae.first_stage_model
    return {name: _stock(getattr(model, name, None)) for name in ("decoder", "encoder")}


def _stock(module: nn.Module | None) -> nn.Module | None:
    """The host's module, of one that was made here before too."""
    forward = None if module is None else vars(module).get("forward")
    return forward.stock if isinstance(forward, LeanForward) else module


def _why_not_vae(vae: Any, stock: dict[str, nn.Module | None]) -> str | None:
    model = vae.first_stage_model
    if type(model) not in (autoencoder.AutoencoderKL, autoencoder.AutoencodingEngine):
        return f"it is a {type(model).__name__}, not a KL image VAE"
    if vae.latent_dim != 2:
        return "it is a video VAE"
    for name, module in stock.items():
        reason = vae_layers.why_not(module)
        if reason is not None:
            return f"in its {name}, {reason}"
    return None


def _take_buffers(changed: Any, decoder: LeanForward) -> bool:
    """Lets the host hand in the result to write into; returns whether it will."""
    if getattr(changed, "max_batch_size", None) is not None:
        return False
    packing = 1 if getattr(changed, "bn", None) is None else changed.ps[0]
    # Weak: the module must not hold itself.
    this, of_class = weakref.proxy(changed), type(changed)

    def encode(pixels: torch.Tensor, *args: Any, device: Any = None, **options: Any) -> Any:
        pixels = pixels if device is None else pixels.to(device)
        return of_class.encode(this, pixels, *args, **options)

    def decode_output_shape(shape: torch.Size) -> tuple[int, int, int, int]:
        batch, channels, height, width = shape
        return decoder.output_shape(
            torch.Size((batch, channels, height * packing, width * packing))
        )

    changed.comfy_has_chunked_io = True
    changed.decode_output_shape = decode_output_shape
    changed.encode = encode
    return _hands_in_results()


def _hands_in_results() -> bool:
    """Whether the host knows of the mark: it reads what its own video VAE has from 0.30 on."""
    try:
        from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
    except ImportError:
        return False
    return getattr(VideoVAE, "comfy_has_chunked_io", False)


class _Need:
    """The bytes that the host shall reckon with, in the place of its estimate."""

    def __init__(
        self,
        stock: Callable[..., float],
        forward: LeanForward,
        settings: VaeSettings,
        vae: Any,
        *,
        takes_buffers: bool,
    ) -> None:
        self.stock, self._forward, self._settings = stock, forward, settings
        self._device = vae.device
        # Strips that are written to another device as they are made hold nothing on this one.
        is_elsewhere = vae.output_device.type != vae.device.type
        self._holds_results = not (forward.is_decoder and is_elsewhere and takes_buffers)
        bn = getattr(vae.first_stage_model, "bn", None)
        self._packing = 1 if bn is None or not forward.is_decoder else vae.first_stage_model.ps[0]

    def __call__(self, shape: Any, dtype: torch.dtype) -> float:
        """For samples [B, C, H, W], or [B, C, T, H, W] of which the host takes the first frame."""
        if vae_layers.why_not(self._forward.stock) is not None:
            return self.stock(shape, dtype)
        height, width = (side * self._packing for side in shape[-2:])
        sample = torch.Size((shape[0], shape[1], height, width))
        call = self._forward.call(sample, dtype, self._device)
        need = self._settings.choose(call).need(call)
        if self._holds_results:
            batch, *result = self._forward.output_shape(sample)
            need += dtype.itemsize * (batch - 1) * math.prod(result)
        return min(self.stock((*shape[:2], *shape[-2:]), dtype), need)


def _is_oom(error: Exception) -> bool:
    # Hosts before 0.20 name only the exception.
    is_oom = getattr(comfy.model_management, "is_oom", None)
    if is_oom is not None:
        return is_oom(error)
    return isinstance(error, comfy.model_management.OOM_EXCEPTION)
