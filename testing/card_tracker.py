"""The tracker of what lies on a card, and a fake card's convolutions as cuDNN runs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from pack.nodes.vae.devices import layout
from pack.testing.tracker import Tracker
from torch._prims_common import suggest_memory_format


class CardTracker(Tracker):
    """Counts what lies on the card, not what was moved to RAM.

    With cuDNN switched off, a convolution also holds the copies that it takes of its input.
    """

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        made = [t for t in (out if isinstance(out, list | tuple) else [out]) if _is_tensor(t)]
        if not made or any(t.device.type == "cuda" for t in made):
            super()._count(func, args, kwargs, out)
        if func is torch.ops.aten.convolution.default and not torch.backends.cudnn.enabled:
            copied = _unrolled_bytes(args[0], args[1], out, is_transposed=args[6])
            self.peak_bytes = max(self.peak_bytes, self.current_bytes + copied)


def _unrolled_bytes(
    given: torch.Tensor, weight: torch.Tensor, made: torch.Tensor, *, is_transposed: bool
) -> int:
    """Bytes of the columns in torch's ConvolutionMM2d.cu and NaiveConvolutionTranspose2d.cu."""
    of_pixel = weight[0].numel() if weight[0, 0].numel() > 1 else 0
    return of_pixel * (given if is_transposed else made)[0, 0].numel() * weight.itemsize


@contextmanager
def cudnn_formats() -> Iterator[None]:
    """Fake convolutions of a card return the memory format that cuDNN's do, also without cuDNN.

    Source: cudnn_conv_suggest_memory_format in torch's aten/src/ATen/native/ConvUtils.h.
    """

    def chosen(given: torch.Tensor, weight: torch.Tensor, backend: Any) -> torch.memory_format:
        last, plain = torch.channels_last, torch.contiguous_format
        is_last = any(suggest_memory_format(t) is last for t in (given, weight))
        return last if is_last and layout(torch.device("cuda")) is last else plain

    with mock.patch.object(torch._C, "_conv_determine_backend_memory_format", chosen):
        yield


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
