"""A copy of the host's VAE object whose Wan VAE runs in strips of rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ...vae.devices import why_stock
from ...vae.video.choice import VideoChoice
from ..base.server import NodeLog
from . import video_layers
from .patch import hands_in_results
from .video_forward import LeanVideo


def is_wan(vae: Any) -> bool:
    """Whether the VAE is of the Wan class."""
    return video_layers.is_known_class(vae.first_stage_model)


def with_lean_video(vae: Any, choice: VideoChoice, log: NodeLog) -> tuple[Any, str | None]:
    """A copy of the VAE that decodes and encodes in strips, and shares its weights and patcher.

    The VAE is left as it is.

    Returns:
        The copy and None, or the VAE itself and the reason.
    """
    model = _stock(vae.first_stage_model)
    reason = video_layers.why_not(model) or why_stock(vae.device, vae.vae_dtype)
    if reason is not None:
        return vae, reason
    lean, changed = copy.copy(vae), copy.copy(model)
    changed.decode = LeanVideo(model, choice, log, is_decoder=True)
    changed.encode = LeanVideo(model, choice, log, is_decoder=False)
    changed.comfy_has_chunked_io = True
    changed.decode_output_shape = changed.decode.output_shape
    lean.first_stage_model = changed
    for name, forward in (("decode", changed.decode), ("encode", changed.encode)):
        stock = getattr(vae, f"memory_used_{name}")
        setattr(lean, f"memory_used_{name}", _need(getattr(stock, "stock", stock), forward, vae))
    return lean, None


def _stock(model: Any) -> Any:
    """The host's model, also of one that `with_lean_video` changed."""
    decode = vars(model).get("decode")
    return decode.stock if isinstance(decode, LeanVideo) else model


def _need(stock: Callable[..., float], forward: LeanVideo, vae: Any) -> Callable[..., float]:
    """An estimate of the bytes of a call, in place of the host's own estimate `stock`."""
    # Hosts that hand in the result get each strip written to its place.
    writes_away = forward.is_decoder and hands_in_results()
    holds_results = not (writes_away and vae.output_device.type != vae.device.type)

    def estimate(shape: Any, dtype: torch.dtype) -> float:
        shape = torch.Size(shape)
        if len(shape) != 5 or min(forward.output_shape(shape)) < 1:
            return stock(shape, dtype)
        if video_layers.why_not(forward.stock) is not None:
            return stock(shape, dtype)
        # Not less where the host's is: it does not count the frames of a long video.
        return forward.need(shape, dtype, vae.device, holds_results=holds_results)

    ours: Any = estimate
    ours.stock = stock
    return ours
