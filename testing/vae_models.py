"""Small VAEs of the host's own classes; its decoder and encoder at full size on fake tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pack.nodes.vae.decode import decode
from pack.nodes.vae.devices import is_unrolled
from pack.nodes.vae.encode import encode
from pack.nodes.vae.peak import lean_vae_ram_bytes
from pack.nodes.vae.plan import Prefer, VaeCall, VaePlan
from pack.nodes.vae.ram import Ram
from pack.testing import norm_parts  # noqa: F401
from pack.testing.card_tracker import CardTracker, cudnn_formats
from pack.testing.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def ddconfig(
    channels: int, latent: int, mult: Sequence[int] = (1, 2, 4, 4), blocks: int = 2
) -> dict[str, Any]:
    """What the host's VAE class makes its decoder and encoder of."""
    return {
        "double_z": True, "z_channels": latent, "resolution": 256, "in_channels": 3, "out_ch": 3,
        "ch": channels, "ch_mult": list(mult), "num_res_blocks": blocks, "attn_resolutions": [],
        "dropout": 0.0,
    }  # fmt: skip


def filled(state: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights that keep the scale of what goes through."""
    torch.manual_seed(seed)
    made = {}
    for name, weight in state.items():
        if weight.dtype.is_floating_point and weight.ndim > 1:
            made[name] = torch.randn(weight.shape) * (2 / weight[0].numel()) ** 0.5
        elif "norm" in name and name.endswith("weight"):
            made[name] = 1 + 0.2 * torch.randn(weight.shape)
        elif name.endswith("running_var"):
            made[name] = 0.5 + torch.rand(weight.shape)
        elif weight.dtype.is_floating_point:
            made[name] = 0.1 * torch.randn(weight.shape)
        else:
            made[name] = weight
    return made


def kl_vae(
    latent: int = 4,
    mult: Sequence[int] = (1, 2, 4, 4),
    *,
    is_packed: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    blocks: int = 2,
) -> Any:
    """A VAE of the class of SD1.5 and SDXL; packed: of Flux.2, which folds 2 x 2 latent pixels."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = ddconfig(32, latent, mult, blocks)
    if is_packed:
        config["batch_norm_latent"] = True
    params = {"ddconfig": config, "embed_dim": latent}
    state = filled(AutoencoderKL(**params).state_dict(), seed)
    vae = comfy.sd.VAE(sd=state, config={"params": params}, dtype=dtype)
    fold = 2 if is_packed else 1
    vae.latent_channels = latent * fold**2
    vae.upscale_ratio = vae.downscale_ratio = 2 ** (len(mult) - 1) * fold
    return vae


def engine_vae(latent: int = 16, *, dtype: torch.dtype = torch.float32) -> Any:
    """A VAE of the class of Flux, SD3 and Z-Image, at its own width, as the host detects it."""
    import comfy.sd
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    kl = "comfy.ldm.modules.diffusionmodules.model."
    config = ddconfig(128, latent)
    model = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{kl}Encoder", "params": config},
        decoder_config={"target": f"{kl}Decoder", "params": config},
    )
    return comfy.sd.VAE(sd=filled(model.state_dict()), dtype=dtype)


def lean(vae: Any, prefer: Prefer = "balance", strip_rows: int = 0) -> Any:
    """The VAE that the node returns."""
    from pack.nodes.lean_vae import LeanVAE

    return LeanVAE.execute(vae, prefer, strip_rows).args[0]


class At:
    """A weight function, as LoRA installs them, that does something at chosen calls."""

    def __init__(self, act: Callable[[], None], calls: set[int]) -> None:
        self.act, self.calls, self.count = act, calls, 0

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        self.count += 1
        if self.count in self.calls:
            self.act()
        return weight


def last_conv(vae: Any) -> Any:
    """The last convolution in a decoder's blocks; `speed` fetches it once, the others oftener."""
    return vae.first_stage_model.decoder.up[0].block[2].conv2


def raise_oom() -> None:
    raise torch.OutOfMemoryError("injected")


class Arithmetic(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and linear layers, in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "linear":
            self.total += out.numel() * args[1].shape[1]
        elif name in ("conv2d", "conv3d", "conv_transpose2d"):
            # Transposed, each tap of a weight meets one in stride x stride pixels.
            strides = math.prod(args[3]) if name == "conv_transpose2d" else 1
            self.total += out[:, 0].numel() * args[1].numel() // strides
        return out


class FakeVae:
    """A full-size decoder or encoder of the host, on fake tensors of a card, of one dtype.

    Attention counts as fused: it holds its result. `arithmetic` is that of the latest run. On the
    device "meta" the tensors are real meta tensors, see issue_time. `around` makes what is called
    instead of the decode or encode, the host's or ours.
    """

    def __init__(
        self,
        *,
        is_decoder: bool,
        latent: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> None:
        import comfy.ldm.modules.diffusionmodules.model as kl

        self.is_decoder, self.latent, self.dtype = is_decoder, latent, dtype
        self.device, self.arithmetic = torch.device(device), Arithmetic()
        self.mode = nullcontext() if device == "meta" else FakeTensorMode()
        self.around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda call: call
        kind = kl.Decoder if is_decoder else kl.Encoder
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.mode, self.device:
                self.model = kind(**ddconfig(128, latent)).eval()
        finally:
            torch.set_default_dtype(default)
        for part in self.model.modules():
            if type(part) is kl.AttnBlock:
                part.optimized_attention = self._attended

    def call(self, height: int, width: int, *, has_ram: bool = True) -> VaeCall:
        """One sample's decode or encode, as the formulas ask for it."""
        from pack.nodes.host.vae import layers as vae_layers

        sizes, unrolled = vae_layers.sizes(self.model), is_unrolled(torch.device("cuda"))
        return VaeCall(sizes, height, width, self.dtype.itemsize, has_ram, unrolled)

    def measure(
        self,
        height: int,
        width: int,
        prefer: Prefer = "balance",
        *,
        batch: int = 1,
        strip_rows: int = 0,
        has_ram: bool = True,
    ) -> tuple[Tracker, int, VaePlan]:
        """One decode or encode on a card: what it held, its multiply-adds, and the plan."""
        from pack.nodes.vae.choice import VaeChoice

        ends = [(3, height, width), (self.latent, height // 8, width // 8)]
        plan = VaeChoice(prefer, strip_rows).plan(self.call(height, width, has_ram=has_ram))
        assert plan is not None
        work = 0
        with torch.inference_mode(), self.mode:
            source, result = ends[::-1] if self.is_decoder else ends
            if not self.is_decoder:
                result = (2 * self.latent, *result[1:])
            x = torch.empty(batch, *source, dtype=self.dtype, device=self.device)
            with CardTracker() as tracker:
                tracker.watch(x)
                out = torch.empty(batch, *result, dtype=self.dtype, device=self.device)
                for index in range(batch):
                    work += self.run(x[index : index + 1], out[index], plan)
        return tracker, work, plan

    def run(self, x: Any, out: Any, plan: VaePlan) -> int:
        """Runs one sample in strips, [1, C, H, W] to [C, H, W]; returns its multiply-adds."""
        from pack.nodes.host.vae import layers as vae_layers

        layers = vae_layers.read(self.model, x)
        first, attention, last = layers.middle
        attention = dataclasses.replace(
            attention, attend=self._attended, most_queries=lambda keys: keys.shape[2]
        )
        layers = dataclasses.replace(layers, middle=(first, attention, last))

        def write(start: int, rows: torch.Tensor) -> None:
            out[:, start : start + rows.shape[2]].copy_(rows[0])

        run = self.around(decode if self.is_decoder else encode)
        call = self.call(*(out if self.is_decoder else x).shape[-2:])
        ram = Ram(torch.empty(lean_vae_ram_bytes(call, plan), dtype=torch.uint8))
        with self._counted() as arithmetic:
            run(x, layers, plan, write=write, tick=lambda share: None, ram=ram)
        return arithmetic.total

    def stock(self, height: int, width: int, *, batch: int = 1) -> Tracker:
        """What the host's own forward holds."""
        with torch.inference_mode(), self.mode:
            shape = (
                (self.latent, height // 8, width // 8) if self.is_decoder else (3, height, width)
            )
            x = torch.empty(batch, *shape, dtype=self.dtype, device=self.device)
            with CardTracker() as tracker, self._counted():
                tracker.watch(x)
                self.around(self.model)(x)
        return tracker

    def stock_work(self, height: int, width: int) -> int:
        """Multiply-adds of the host's own forward of one sample."""
        self.stock(height, width)
        return self.arithmetic.total

    @contextmanager
    def _counted(self) -> Iterator[Arithmetic]:
        self.arithmetic = Arithmetic()
        with cudnn_formats(), self.arithmetic:
            yield self.arithmetic

    def _attended(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        # Ours are [1, 1, T, C], the host's [B, C, H, W].
        keys = key.shape[2] if key.shape[1] == 1 else key[0, 0].numel()
        self.arithmetic.total += 2 * query.numel() * keys
        return torch.empty_like(query)
