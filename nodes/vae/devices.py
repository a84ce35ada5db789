"""What Lean VAE does on each kind of device.

| device | stays stock | layout of strips | convolutions unroll | maps in RAM | norm in parts |
|---|---|---|---|---|---|
| CPU | no | channels last | no | no | no |
| NVIDIA | no | channels last, contiguous without cuDNN | without cuDNN | yes | yes |
| AMD | no | contiguous | without MIOpen | yes | yes |
| Apple | half types | contiguous | no | no | no |
| others | yes | | | | |

ComfyUI switches MIOpen off on newer AMD cards; torch's switch is the one of cuDNN.
"""

from __future__ import annotations

import torch
from torch.backends import cudnn

_NAMES = {"xpu": "Intel GPUs", "privateuseone": "DirectML"}


def why_stock(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a VAE that computes on the device in that dtype must stay stock; None if it need not."""
    if device.type in ("cpu", "cuda"):
        return None
    if device.type == "mps":
        # PyTorch ends the process at a batch norm of half-precision rows with float32 statistics.
        is_known = dtype == torch.float32
        return None if is_known else "on Apple GPUs Lean VAE needs ComfyUI's option --fp32-vae"
    return f"Lean VAE has not been tested on {_NAMES.get(device.type, device.type)}"


def layout(device: torch.device) -> torch.memory_format:
    """The memory format of strips: channels last where convolutions are known to be faster so."""
    is_cudnn = device.type == "cuda" and torch.version.hip is None and cudnn.enabled
    is_known = is_cudnn or device.type == "cpu"
    return torch.channels_last if is_known else torch.contiguous_format


def is_unrolled(device: torch.device) -> bool:
    """Whether torch copies the nine pixels that each result of a 3 x 3 convolution needs (im2col).

    Source: _slow_conv2d_forward in its aten/src/ATen/native/cuda/ConvolutionMM2d.cu.
    """
    return device.type == "cuda" and not cudnn.enabled


def has_ram(device: torch.device) -> bool:
    """Whether large maps may wait in RAM: copies from and to pinned RAM go beside the work."""
    return device.type == "cuda"


def has_norm_parts(device: torch.device) -> bool:
    """Whether torch has the three parts of a batch norm that `statistics` names, one launch each.

    Source: its aten/src/ATen/native/native_functions.yaml names CUDA alone; AMD cards run as such.
    """
    return device.type == "cuda"
