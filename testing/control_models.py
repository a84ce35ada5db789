"""Z-Image Fun ControlNets of the host's own class, put on a model by the host's own node.

Narrow ones with random weights, and at full size with fake ones.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from pack.nodes.denoiser.sizes import ControlSizes, Request

from . import attention_models, lean_models
from .stock_forward import FakeDenoiser

# The host's patch spreads a ControlNet's layers over 30. Here 15 add to every second, and 6 to the
# first and the last. It holds the last stream into the next step: near the 30th it would end.
NARROW = {**lean_models.Z_IMAGE, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "n_layers": 6}
# The published ones, as the host's loader makes them.
UNIONS: dict[str, dict[str, Any]] = {
    "union": {},
    "union 2.0": {
        "n_control_layers": 15, "additional_in_dim": 17, "refiner_control": True, "broken": True,
    },
    "union 2.1": {"n_control_layers": 15, "additional_in_dim": 17, "refiner_control": True},
    "lite": {"n_control_layers": 3, "additional_in_dim": 17, "refiner_control": True},
}  # fmt: skip


def control_net(*, seed: int = 4, **config: Any) -> Any:
    """A MODEL_PATCH, of the width of `NARROW` unless the configuration has another."""
    import comfy.ldm.lumina.controlnet as controlnet
    import comfy.ops

    sizes = {name: NARROW[name] for name in ("dim", "n_heads", "n_kv_heads")}
    net = controlnet.ZImage_Control(
        **{**sizes, **config}, dtype=torch.float32, operations=comfy.ops.manual_cast
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return attention_models.patcher(net.eval())


def net_sizes(name: str) -> ControlSizes:
    """What our formulas count of one of `UNIONS`."""
    config = {"n_control_layers": 6, "refiner_control": False, "broken": False, **UNIONS[name]}
    return ControlSizes(
        config["n_control_layers"],
        config["refiner_control"],
        config["broken"],
        16 + config.get("additional_in_dim", 0),
    )


def picture(height: int, width: int, *, seed: int = 5, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, height, width, 3, generator=torch.Generator().manual_seed(seed))


def controlled(model: Any, net: Any, vae: Any, *, strength: float = 1.0, **pictures: Any) -> Any:
    """The model behind the host's own node, with a patch of its own."""
    with torch.inference_mode():
        node = model_patch_nodes().ZImageFunControlnet()
        return node.diffsynth_controlnet(model, net, vae, strength=strength, **pictures)[0]


@functools.cache
def model_patch_nodes() -> ModuleType:
    """The file of the host's node, under its path as its name, as the host loads it."""
    import comfy.options

    file = Path(comfy.options.__file__).parent.parent / "comfy_extras" / "nodes_model_patch.py"
    spec = importlib.util.spec_from_file_location(str(file.with_suffix("")), file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _FakeVae:
    """What the host's patch asks a VAE for, of a picture of fake numbers."""

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        batch, height, width, _ = pixels.shape
        return pixels.new_empty(batch, 16, height // 8, width // 8)


@contextmanager
def fake_controlled(
    denoiser: FakeDenoiser, patcher: Any, request: Request, *nets: str
) -> Iterator[Any]:
    """The patcher behind the host's nodes, with ControlNets of full size and fake weights.

    Their streams count as the denoiser's do; their weights, and the hint's latent, do not.
    """
    import comfy.ldm.lumina.controlnet as controlnet
    import comfy.ldm.lumina.model as lumina
    import comfy.ops
    from comfy.ldm.modules.attention import attention_pytorch
    from comfy.model_patcher import ModelPatcher

    device = denoiser.device
    with denoiser.mode, device:
        pixels = torch.empty(1, request.height_px, request.width_px, 3, dtype=denoiser.dtype)
        for name in nets:
            net = controlnet.ZImage_Control(
                **UNIONS[name],
                dtype=denoiser.dtype,
                device=device,
                operations=comfy.ops.disable_weight_init,
            )
            held = ModelPatcher(net, load_device=device, offload_device=device)
            patcher = controlled(patcher, held, _FakeVae(), image=pixels)
    patches = patcher.model_options["transformer_options"]["patches"]["double_block"]
    # The host gives a ControlNet's blocks no options, by which `FakeDenoiser` chooses SDPA.
    chosen = mock.patch.object(lumina, "optimized_attention_masked", attention_pytorch)
    try:
        with chosen:
            yield patcher
    finally:
        for patch in patches:  # else the end of the patcher would move it, outside of the mode
            patch.encoded_image = None
