"""A copy of the host's VAE object whose decoder and encoder run in strips of rows."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
from typing import Any

import comfy.ldm.models.autoencoder as autoencoder
import torch

from ...vae.devices import why_stock
from ...vae.plan import VaeCall, VaeSizes
from ..base.server import NodeLog
from . import layers as vae_layers
from .forward import LeanForward, VaeSettings


def with_lean_vae(vae: Any, settings: VaeSettings, log: NodeLog) -> tuple[Any, str | None]:
    """A copy of the VAE that decodes and encodes in strips, and shares its weights and patcher.

    The VAE is left as it is.

    Returns:
        The copy and None, or the VAE itself and the reason.
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
        part.forward = forwards[name] = LeanForward(module, settings, log, vae.patcher)
        setattr(changed, name, part)
    takes_buffers = _take_buffers(changed, forwards["decoder"])
    lean.first_stage_model = changed
    for name, of_stock in (("decoder", "memory_used_decode"), ("encoder", "memory_used_encode")):
        stock_need = getattr(vae, of_stock)
        stock_need = getattr(stock_need, "stock", stock_need)
        need = _need(stock_need, forwards[name], settings, vae, takes_buffers=takes_buffers)
        setattr(lean, of_stock, need)
    return lean, None


def example_call(vae: Any, side: int) -> VaeCall:
    """The decode of a square picture by a VAE that `with_lean_vae` made."""
    forward = vae.first_stage_model.decoder.forward
    side //= vae_layers.sizes(forward.stock).factor
    return forward.call(torch.Size((1, 1, side, side)), vae.vae_dtype, vae.device)


def decoder_sizes(vae: Any) -> VaeSizes | None:
    """The sizes of a VAE's decoder; None if it cannot run in strips."""
    stock = _stock_parts(vae)
    return vae_layers.sizes(stock["decoder"]) if _why_not_vae(vae, stock) is None else None


def _stock_parts(vae: Any) -> dict[str, Any]:
    model = vae.first_stage_model
    return {name: _stock(getattr(model, name, None)) for name in ("decoder", "encoder")}


def _stock(module: Any) -> Any:
    """The host's module, also of one that `with_lean_vae` changed; None stays None."""
    forward = None if module is None else vars(module).get("forward")
    return forward.stock if isinstance(forward, LeanForward) else module


def _why_not_vae(vae: Any, stock: dict[str, Any]) -> str | None:
    model = vae.first_stage_model
    if type(model) not in (autoencoder.AutoencoderKL, autoencoder.AutoencodingEngine):
        return f"it is a {type(model).__name__}, not a KL image VAE"
    if vae.latent_dim != 2:
        return "it is a video VAE"
    for name, module in stock.items():
        reason = vae_layers.why_not(module)
        if reason is not None:
            return f"in its {name}, {reason}"
    return why_stock(vae.device, vae.vae_dtype)


def _take_buffers(changed: Any, decoder: LeanForward) -> bool:
    """Lets the host pass the tensor for the result; returns whether this host does."""
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
    return hands_in_results()


def hands_in_results() -> bool:
    """Whether the host reads `comfy_has_chunked_io`: its own video VAE has it from 0.30 on."""
    try:
        from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE
    except ImportError:
        return False
    return getattr(VideoVAE, "comfy_has_chunked_io", False)


def _need(
    stock: Callable[..., float],
    forward: LeanForward,
    settings: VaeSettings,
    vae: Any,
    *,
    takes_buffers: bool,
) -> Callable[..., float]:
    """An estimate of the bytes of a call, in place of the host's own estimate `stock`."""
    # Of a batch, only the result at work lies here if each is copied to another device when it is
    # done. The choice's need counts that one.
    is_elsewhere = vae.output_device.type != vae.device.type
    holds_results = not (forward.is_decoder and is_elsewhere and takes_buffers)
    bn = getattr(vae.first_stage_model, "bn", None)
    packing = 1 if bn is None or not forward.is_decoder else vae.first_stage_model.ps[0]
    device = vae.device

    def estimate(shape: Any, dtype: torch.dtype) -> float:
        """For samples [B, C, H, W], or [B, C, T, H, W] of which the host takes the first frame."""
        if vae_layers.why_not(forward.stock) is not None:
            return stock(shape, dtype)
        height, width = (side * packing for side in shape[-2:])
        sample = torch.Size((shape[0], shape[1], height, width))
        call = forward.call(sample, dtype, device)
        need = settings.choose(call, device).need(call)
        if holds_results:
            batch, *result = forward.output_shape(sample)
            need += dtype.itemsize * (batch - 1) * math.prod(result)
        return min(stock((*shape[:2], *shape[-2:]), dtype), need)

    ours: Any = estimate
    ours.stock = stock
    return ours
