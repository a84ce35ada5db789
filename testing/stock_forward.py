"""The host's own Z-Image transformer at full size on fake tensors: exact bytes, no weights.

Everything is the host's: the class, its operations, its model options. Only the tensors are fake,
so a forward at 4096x4096 takes a second and no memory. They are CUDA tensors to torch, which needs
no card for them, so that code which differs by device runs as on a card. Fused operations of
comfy-kitchen run their registered fake kernels and count their outputs, as the CUDA kernels do; the
float32 copies of their eager form are not seen.

Two ways to call it. `model`: the transformer as BaseModel.apply_model calls it. `apply`: through
apply_model, which holds the float32 latent beside its cast. The latent and the text count as
allocations in both; the weights do not.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pack.nodes.denoiser.sizes import Z_IMAGE, Request, TransformerSizes
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode

Route = Literal["model", "apply"]
Weights = Literal["plain", "cast", "streamed", "patched", "scaled", "int8"]
FEATURE_WIDTH = 1152
QUANTISED = {"scaled": "float8_e4m3fn", "int8": "int8_tensorwise"}


class Inputs(NamedTuple):
    """What one call is made with.

    latent: [B, C, H, W], the model's dtype or, for apply_model, float32 as samplers keep it.
    sigma: noise level of each sample, [B], float32.
    text: hidden states of the text encoder, [B, T, cap_dim], the model's dtype.
    """

    latent: torch.Tensor
    sigma: torch.Tensor
    text: torch.Tensor


def settle_host(host_dir: Path, base_dir: Path) -> None:
    """Makes the unpacked host importable in a process of its own, on the CPU, with SDPA attention.

    Call it before anything imports the host; it reads its settings once.
    """
    # In front: the working directory may have a `nodes` of its own.
    sys.path.insert(0, str(host_dir))
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(base_dir)
    args.disable_api_nodes = True
    # What the host chooses by itself on NVIDIA cards; on the CPU it would be sub-quadratic.
    args.use_pytorch_cross_attention = True
    import utils.extra_config  # noqa: F401 (before what hides `utils` in hosts up to 0.24)


def unet_config(sizes: TransformerSizes) -> dict[str, Any]:
    """What the host's detection says of a Z-Image file of these sizes.

    Source: detect_unet_config in comfy/model_detection.py.
    """
    return {
        "image_model": "lumina2",
        "patch_size": sizes.patch,
        "in_channels": sizes.channels,
        "dim": sizes.dim,
        "cap_feat_dim": sizes.cap_dim,
        "n_layers": sizes.layers,
        "n_refiner_layers": sizes.refiner_layers,
        "qk_norm": True,
        "n_heads": sizes.heads,
        "n_kv_heads": sizes.kv_heads,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": sizes.ffn_dim / sizes.dim,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": sizes.pad_multiple,
        **({"siglip_feat_dim": FEATURE_WIDTH} if sizes.has_features else {}),
    }


class FakeModel:
    """A BaseModel of the host with fake weights on a device."""

    model: Any
    mode: Any
    device: torch.device

    def patcher(self) -> Any:
        """A fresh ModelPatcher for nodes to clone and patch; SDPA attention is chosen on it."""
        from comfy.model_patcher import ModelPatcher

        with self.mode:
            patcher = ModelPatcher(self.model, load_device=self.device, offload_device=self.device)
        patcher.model_options["transformer_options"].update(sdpa_options(self.device))
        return patcher


class FakeDenoiser(FakeModel):
    """The host's BaseModel of Z-Image with fake weights.

    Args:
        sizes: the transformer's sizes; fewer `layers` (2 are enough) give the same peak sooner.
        dtype: of weights and activations.
        device: "cuda" measures what a card holds, "cpu" also the CPU's float32 copies; a torch
            without CUDA has the latter alone. "meta" makes real meta tensors instead of fake ones,
            see issue_time.
        weights: "cast" stores them in fp8, so that each use makes a copy in `dtype`; "streamed"
            keeps them in RAM, in `dtype`, as for a model that does not fit; "patched" is
            "streamed" with a function per weight, as of a LoRA, that works in place; "scaled" and
            "int8" have the blocks' layers in the host's formats for fp8 with scales, which a card
            without fp8 products dequantises, and for int8, which are kept in RAM.
    """

    def __init__(
        self,
        sizes: TransformerSizes = Z_IMAGE,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda" if torch.backends.cuda.is_built() else "cpu",
        weights: Weights = "plain",
    ) -> None:
        import comfy.ops
        import comfy.supported_models

        config = comfy.supported_models.ZImage(unet_config(sizes))
        if weights == "cast":
            config.set_inference_dtype(torch.float8_e4m3fn, dtype)
        else:
            config.set_inference_dtype(dtype, None)
        if weights in QUANTISED:
            config.custom_operations = comfy.ops.mixed_precision_ops({}, dtype)
        self.sizes, self.dtype, self.device = sizes, dtype, torch.device(device)
        self.mode = nullcontext() if device == "meta" else FakeTensorMode()
        is_in_ram = weights in ("streamed", "patched", "int8")
        with self.mode:
            self.model = config.get_model({}, device="cpu" if is_in_ram else self.device)
            if weights in QUANTISED:
                quantise(
                    self.model.diffusion_model,
                    QUANTISED[weights],
                    dtype,
                    lambda path: ".attention." in path or ".feed_forward." in path,
                )
        for layer in self.model.modules() if is_in_ram else ():
            if hasattr(layer, "comfy_cast_weights"):  # as the host's ModelPatcher.load sets it
                layer.comfy_cast_weights = True
                if weights == "patched" and isinstance(layer, torch.nn.Linear):
                    layer.weight_function = [lambda weight: weight.add_(1)]

    def measure(
        self,
        request: Request,
        *,
        patcher: Any = None,
        route: Route = "model",
        around: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None,
        **tracking: Any,
    ) -> Tracker:
        """Runs one forward as in sampling, without gradients, and returns what it held.

        Args:
            request: sizes of the call; its `sizes` are replaced by this model's. Its reference
                pictures are as large as the picture and have no texts, but all their features.
            patcher: a clone of `patcher()` that nodes patched; None runs the host alone.
            route: `model` or `apply`, see above.
            around: makes what is called instead of the transformer (`model`) or apply_model.
            tracking: options of Tracker (attention, log). Fake CUDA tensors have no card
                that could choose, so their attention is "flash" unless named.
        """
        request = dataclasses.replace(
            request, sizes=self.sizes, dtype_bytes=torch.empty(0, dtype=self.dtype).itemsize
        )
        if self.device.type == "cuda":
            tracking.setdefault("attention", "flash")
        tracker = Tracker(**tracking)
        with (
            torch.inference_mode(),  # as the host runs nodes
            installed(self.patcher() if patcher is None else patcher) as options,
            self.mode,
            self.device,  # where tensors are made without naming a device
        ):
            inputs = self._inputs(request, route)
            call, text_name = self.model.apply_model, "c_crossattn"
            if route == "model":
                call, text_name = self.model.diffusion_model, "context"
            if around is not None:
                call = around(call)
            keywords = {
                text_name: inputs.text,
                "control": None,
                "num_tokens": request.text_tokens,
                "transformer_options": {
                    **options, "cond_or_uncond": [0], "sigmas": inputs.sigma[:1],
                },
            }  # fmt: skip
            references = self._references(request)
            keywords |= references
            with tracker:
                tracker.watch(*inputs, *chain(*references.values()))
                call(inputs.latent, inputs.sigma, **keywords)
        return tracker

    def _references(self, request: Request) -> dict[str, list[torch.Tensor]]:
        count = request.reference_tokens // request.padded_image_tokens
        shapes = {"ref_latents": (request.batch, *request.latent_shape[1:])}
        if request.reference_feature_tokens:  # the drawn picture has padding alone
            each = (request.reference_feature_tokens - self.sizes.pad_multiple) // count
            shapes["siglip_feats"] = (request.batch, each // 16, 16, FEATURE_WIDTH)
        return {
            name: [torch.empty(shape, dtype=self.dtype) for _ in range(count)]
            for name, shape in shapes.items()
            if count
        }

    def _inputs(self, request: Request, route: Route) -> Inputs:
        return Inputs(
            latent=torch.empty(
                request.latent_shape, dtype=self.dtype if route == "model" else torch.float32
            ),
            sigma=torch.empty(request.batch),
            text=torch.empty(
                request.batch, request.text_tokens, self.sizes.cap_dim, dtype=self.dtype
            ),
        )


def quantise(
    transformer: torch.nn.Module,
    name: str,
    dtype: torch.dtype,
    is_chosen: Callable[[str], bool],
    *,
    multiplies: bool = False,
) -> None:
    """Gives the linear layers their weights, those chosen by path in that format, as loading does.

    Source: _load_quantized_module in the host's comfy/ops.py.

    Args:
        multiplies: as on a card that multiplies such numbers; of formats whose products quantise
            the rows it is always so.
    """
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[name]["comfy_tensor_layout"]
    multiplies = multiplies or not QUANT_ALGOS[name].get("quantize_input", True)
    for path, layer in transformer.named_modules():
        if not hasattr(layer, "_full_precision_mm"):
            continue
        shape, device = (layer.out_features, layer.in_features), layer.factory_kwargs["device"]
        weight = torch.empty(shape, dtype=dtype, device=device)
        if is_chosen(path):
            weight = QuantizedTensor.from_float(weight, layout, scale="recalculate")
            layer.quant_format, layer.layout_type = name, layout
            layer._full_precision_mm = not multiplies
            if name == "nvfp4":  # as files have it; otherwise the rows of a call share one
                scale = torch.empty((), device=device)
                layer.input_scale = torch.nn.Parameter(scale, requires_grad=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)


def sdpa_options(device: torch.device) -> dict[str, Any]:
    """Options that choose SDPA where the host, started with --cpu alone, has chosen another.

    For fake CUDA tensors always, since there is no card to ask which kernel it would take.
    """
    from comfy.ldm.modules import attention

    if device.type == "cpu" and attention.optimized_attention is attention.attention_pytorch:
        return {}
    return {
        "optimized_attention_override": lambda _, *args, **kwargs: attention.attention_pytorch(
            *args, **kwargs
        )
    }


@contextmanager
def installed(patcher: Any) -> Iterator[dict[str, Any]]:
    """Puts a patcher's patches in place as sampling does; yields its transformer_options."""
    import comfy.model_patcher
    import comfy.sampler_helpers

    model_options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
    comfy.sampler_helpers.prepare_model_patcher(patcher, {}, model_options)
    patcher.patch_model(load_weights=False)
    patcher.model.current_patcher = patcher
    try:
        patcher.pre_run()
        yield model_options["transformer_options"]
    finally:
        patcher.cleanup()
        patcher.unpatch_model(unpatch_weights=False)
