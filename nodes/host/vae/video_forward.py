"""The decode and encode of the host's Wan VAE in strips of rows, in place of its own."""

from __future__ import annotations

from typing import Any

import torch

from ...vae.devices import is_unrolled, why_stock
from ...vae.video.choice import VideoChoice
from ...vae.video.run import decode, encode
from ...vae.video.sizes import VideoCall, VideoPlan
from ..base.server import NodeLog
from . import video_layers
from .attempts import Progress, with_attempts

# Pixels below which a progress bar would only flicker, as under each tile of a tiled decode.
_LONG_PX = 768**2


class LeanVideo:
    """Runs a WanVAE's decode or encode in strips, or its own code where strips do not fit.

    stock: the host's WanVAE.
    """

    def __init__(self, stock: Any, choice: VideoChoice, log: NodeLog, *, is_decoder: bool) -> None:
        self.stock, self.is_decoder = stock, is_decoder
        # Read once: where the layers are no longer these, the host's own code runs.
        self._sizes = video_layers.sizes(stock, is_decoder=is_decoder)
        self._choice, self._log = choice, log

    def __call__(
        self,
        given: torch.Tensor,
        *args: Any,
        output_buffer: torch.Tensor | None = None,
        device: torch.device | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Decodes or encodes samples [B, C, T, H, W].

        Args:
            output_buffer: takes the result; hosts from 0.30 hand it in for a decode.
            device: to which those hosts leave it to move what is encoded.
        """
        given = given if device is None else given.to(device)
        reason = self._why_not(given, (*map(str, args), *options))
        if reason is not None:
            text = f"ComfyUI's own code runs: {reason}"
            self._log.say_once(text, text)
            run = self.stock.decode if self.is_decoder else self.stock.encode
            made = run(given, *args, **options)
            return made if output_buffer is None else output_buffer.copy_(made)
        if output_buffer is None:
            shape = self.output_shape(given.shape)
            output_buffer = torch.empty(shape, dtype=given.dtype, device=given.device)
        call = self.call(given.shape, given.dtype, given.device)
        for index in range(given.shape[0]):
            one = slice(index, index + 1)
            # An encoder leaves frames out that would not fill a frame of the latent.
            frames = self.stock_frames(given.shape[2])
            self._run(given[one, :, :frames], output_buffer[one], call)
        return output_buffer

    def stock_frames(self, frames: int) -> int:
        """Frames that are read of so many."""
        factor = self._sizes.frame_factor
        return frames if self.is_decoder else 1 + (frames - 1) // factor * factor

    def output_shape(self, shape: torch.Size) -> tuple[int, int, int, int, int]:
        """The shape of the result for samples [B, C, T, H, W]."""
        sizes, (batch, _, frames, height, width) = self._sizes, shape
        channels, factor, times = sizes.links[-1].made, sizes.factor, sizes.frame_factor
        if self.is_decoder:
            channels //= sizes.patch**2
            return batch, channels, 1 + (frames - 1) * times, height * factor, width * factor
        return batch, channels, 1 + (frames - 1) // times, height // factor, width // factor

    def call(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> VideoCall:
        """The call for one of the samples [B, C, T, H, W]."""
        height, width = (self.output_shape(shape) if self.is_decoder else shape)[-2:]
        frames = self.stock_frames(shape[2])
        unrolled = is_unrolled(device)
        return VideoCall(self._sizes, frames, height, width, dtype.itemsize, unrolled)

    def need(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        *,
        holds_results: bool,
    ) -> int:
        """Bytes to reserve for samples [B, C, T, H, W]; with their results or without."""
        call = self.call(shape, dtype, device)
        result = torch.Size(self.output_shape(shape)).numel() if holds_results else 0
        others = (shape[0] - 1) * torch.Size(shape[1:]).numel()
        return self._choice.need(call) + dtype.itemsize * (result + others)

    def report(self, side: int, dtype: torch.dtype, device: torch.device) -> str:
        """The node's line, for a decode of one square picture."""
        side //= self._sizes.factor
        return self._choice.report(self.call(torch.Size((1, 1, 1, side, side)), dtype, device))

    def _why_not(self, given: torch.Tensor, options: tuple[str, ...]) -> str | None:
        if options:
            return f"it was called with {', '.join(options)}"
        reason = why_stock(given.device, given.dtype) or video_layers.why_not(self.stock)
        if reason is not None:
            return reason
        if given.ndim != 5 or min(self.output_shape(given.shape)) < 1:
            return f"a tensor of shape {tuple(given.shape)}"
        sizes, sides = self._sizes, given.shape[-2:]
        if sizes.shortcuts and not self.is_decoder and any(side % sizes.factor for side in sides):
            return f"sides that are not a multiple of {sizes.factor}"
        wants = given.requires_grad or any(p.requires_grad for p in self.stock.parameters())
        return "gradients are on" if torch.is_grad_enabled() and wants else None

    def _run(self, sample: torch.Tensor, result: torch.Tensor, call: VideoCall) -> None:
        layers = video_layers.read(self.stock, sample, is_decoder=self.is_decoder)
        is_long = call.height * call.width * call.frames > _LONG_PX

        def write(first: int, rows: torch.Tensor) -> None:
            result[:, :, :, first : first + rows.shape[3]].copy_(rows)

        def attempt(plan: VideoPlan) -> None:
            run, tick = decode if self.is_decoder else encode, Progress(2 if is_long else None)
            run(sample, layers, call, plan, write=write, tick=tick)

        def say(plan: VideoPlan) -> None:
            self._log.say(
                f"out of memory: tried again with strips of {plan.rows} rows, prefer {plan.prefer}"
            )

        with_attempts(lambda count: self._choice.plan(call, count), attempt, say)
