"""How far results are from those of float64: the host's, ours, and both kernel by kernel.

One set of weights serves every dtype: the host's own layers cast them at each call, as they do for
a model that is loaded for another dtype than its weights'. So all errors are against the host's own
code in float64 with the same weights and inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch.nn import functional

from ..host import Host, Loaded
from ..job import Picture
from ..rows import Recorder, Row
from ..sampling import Meter, sample, vae_latent_for
from ..variants import DEFAULT, HOST, make

# What every row of a comparison has.
BLANK: Row = {
    "is_bit_equal": None, "relative_error": None, "largest_error": None,
    "host_relative_error": None, "reference": None, "seconds": None, "tf32": None,
}  # fmt: skip
FLOAT64 = "float64"
# With the text 832 and 1280 tokens: chunks of 512 and a shorter rest; the strips leave a rest too.
PICTURES = (Picture(432, 336), Picture(512, 512))
REHEARSED, VAE_REHEARSED = (Picture(432, 336),), (Picture(40, 24),)
DENOISERS = (DEFAULT, "+ Attention Slice auto", "+ Attention Slice max")
PREFERENCES = ("speed", "balance", "smallest")


class Arithmetic(NamedTuple):
    """A dtype, and whether float32 products and convolutions may use TF32; None leaves that."""

    dtype: torch.dtype
    tf32: bool | None = None

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.") + (" TF32" if self.tf32 else "")

    def facts(self, device: torch.device) -> Row:
        """For a row; `tf32` is None where it makes no difference."""
        has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        name = str(self.dtype).removeprefix("torch.")
        return {"dtype": name, "tf32": self.tf32 if has_tf32 else None, "reference": FLOAT64}


ARITHMETICS = (
    Arithmetic(torch.bfloat16),
    Arithmetic(torch.float32, tf32=False),
    Arithmetic(torch.float32, tf32=True),
)
EXACT = Arithmetic(torch.float64)


def run(host: Host, rows: Recorder, loaded: Loaded) -> None:
    """Rows of whole forwards, decodes and single kernels, as users run them first."""
    from . import exact_bench

    denoiser, decoder = Denoiser(host, loaded.model), Decoder(host, loaded.vae)
    is_small = host.job.is_rehearsal
    bench = exact_bench.Bench(host, loaded)
    for arithmetic in ARITHMETICS[:2] if is_small else ARITHMETICS:  # a CPU has no TF32
        for picture in REHEARSED if is_small else PICTURES:
            denoiser.compare(rows, picture, arithmetic)
        for picture in VAE_REHEARSED if is_small else PICTURES:
            decoder.compare(rows, picture, arithmetic)
        bench.compare(rows, arithmetic)
    host.unload()


def against(found: torch.Tensor, wanted: torch.Tensor) -> Row:
    """Relative error by the norm, and the largest error.

    Raises:
        RuntimeError: the result is not finite.
    """
    if not found.isfinite().all():
        raise RuntimeError("the result is not finite")
    wanted = wanted.double()
    off = found.to(wanted.device).double() - wanted
    return {
        "relative_error": (off.norm() / wanted.norm()).item(),
        "largest_error": off.abs().max().item(),
    }


def compared(found: torch.Tensor, by_host: torch.Tensor, exact: torch.Tensor) -> Row:
    """The errors of a result and of the host's against float64, and whether these two are equal."""
    return {
        **against(found, exact),
        "host_relative_error": against(by_host, exact)["relative_error"],
        "is_bit_equal": torch.equal(found, by_host),
    }


@contextmanager
def computing_in(module: torch.nn.Module, arithmetic: Arithmetic) -> Iterator[None]:
    """The host's layers cast their weights to the dtype of what they are given.

    Of a model that already computes in that dtype nothing is changed.
    """
    from comfy.k_diffusion.utils import tf32_mode

    layers = [layer for layer in module.modules() if hasattr(layer, "comfy_cast_weights")]
    with ExitStack() as until:
        until.enter_context(tf32_mode(arithmetic.tf32, arithmetic.tf32))
        if any(weight.dtype != arithmetic.dtype for weight in module.parameters()):
            for layer in layers:
                until.enter_context(mock.patch.object(layer, "comfy_cast_weights", True))
        if arithmetic is EXACT:
            until.enter_context(_in_float64())
        yield


@contextmanager
def _in_float64() -> Iterator[None]:
    """Plain operations in the place of those that know no float64."""
    import comfy.ldm.lumina.model as lumina
    import comfy.quant_ops
    from pack.nodes.denoiser import reference
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def rotated(rows: Any, table: Any, weight: Any, epsilon: float) -> torch.Tensor:
        # [1, T, H, C], [1, T, 1, C / 2, 2, 2]
        normed = reference.rms_norm(rows[0], weight, epsilon=epsilon)
        return reference.rotary(normed, table[0, :, 0])[None]

    def rms_rope(q: Any, k: Any, table: Any, q_scale: Any, k_scale: Any, epsilon: float) -> Any:
        return rotated(q, table, q_scale, epsilon), rotated(k, table, k_scale, epsilon)

    def attention(q: Any, k: Any, v: Any, heads: int, mask: Any = None, **_: Any) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(2)  # [1, H, T, C] -> [1, T, H * C]

    with (
        mock.patch.object(comfy.quant_ops.ck, "rms_rope", rms_rope),
        mock.patch.object(lumina, "optimized_attention_masked", attention),
    ):
        yield


class Denoiser:
    """What the transformer gives in the first step of a sampling, by each way and dtype."""

    def __init__(self, host: Host, model: Any) -> None:
        self._host, self._model = host, model
        self._exact: dict[Picture, torch.Tensor] = {}

    def compare(self, rows: Recorder, picture: Picture, arithmetic: Arithmetic) -> None:
        """Rows of the host and of each way."""
        case = f"{picture} {arithmetic}"
        if all(rows.has(case, name) for name in (HOST, *DENOISERS)):
            return
        by_host: torch.Tensor | None = None
        for name in (HOST, *DENOISERS):
            with rows.attempt(case, name) as figures:
                figures |= {**BLANK, **arithmetic.facts(self._host.device)}
                if name == HOST:
                    if picture not in self._exact:
                        self._exact[picture] = self._predict(HOST, picture, EXACT)[0]
                    by_host, figures["seconds"] = self._predict(HOST, picture, arithmetic)
                    found = by_host
                else:
                    found, figures["seconds"] = self._predict(name, picture, arithmetic)
                figures |= compared(found, by_host, self._exact[picture])
            if by_host is None:  # there is nothing to compare with, as its row says
                return

    def _predict(
        self, name: str, picture: Picture, arithmetic: Arithmetic
    ) -> tuple[torch.Tensor, float]:
        """The transformer's first result, on the CPU, and the seconds of the second step."""
        base = self._model.model
        results: list[torch.Tensor] = []

        def keep(module: Any, given: Any, result: torch.Tensor) -> None:
            if not results:
                results.append(result.cpu())

        # Samplers ask `get_dtype_inference`, so patch what it reads.
        is_own = arithmetic.dtype == base.get_dtype_inference()
        with ExitStack() as until:
            until.enter_context(computing_in(base.diffusion_model, arithmetic))
            if not is_own:
                cast = mock.patch.object(base, "manual_cast_dtype", arithmetic.dtype)
                until.enter_context(cast)
            hook = base.diffusion_model.register_forward_hook(keep)
            until.callback(hook.remove)
            found = sample(self._host, make(name, self._model), picture, steps=1)
        if getattr(base, "model_lowvram", False):
            # A small card: layers that the host has just sent to RAM must go on casting.
            self._host.unload()
        return results[0], found.step_s[-1]


class Decoder:
    """What the VAE's decoder gives, before the host cuts the values off, by each way and dtype."""

    def __init__(self, host: Host, vae: Any) -> None:
        self._host, self._vae = host, vae
        self._exact: dict[Picture, torch.Tensor] = {}

    def compare(self, rows: Recorder, picture: Picture, arithmetic: Arithmetic) -> None:
        """Rows of the host and of Lean VAE's preferences."""
        case = f"{picture} decode {arithmetic}"
        names = {HOST: None, **{f"Lean VAE {prefer}": prefer for prefer in PREFERENCES}}
        if all(rows.has(case, name) for name in names):
            return
        by_host: torch.Tensor | None = None
        for name, prefer in names.items():
            with rows.attempt(case, name) as figures, torch.inference_mode():
                figures |= {**BLANK, **arithmetic.facts(self._host.device)}
                if prefer is None:
                    if picture not in self._exact:
                        self._exact[picture] = self._decode(None, picture, EXACT)[0]
                    by_host, figures["seconds"] = self._decode(None, picture, arithmetic)
                    found = by_host
                else:
                    found, figures["seconds"] = self._decode(prefer, picture, arithmetic)
                figures |= compared(found, by_host, self._exact[picture])
            if by_host is None:
                return

    def _decode(
        self, prefer: str | None, picture: Picture, arithmetic: Arithmetic
    ) -> tuple[torch.Tensor, float]:
        """The picture [1, 3, H, W] on the CPU, and the seconds of the decode."""
        import comfy.ldm.modules.diffusionmodules.model as kl
        import comfy.model_management
        from pack.nodes.lean_vae import LeanVAE

        vae, device = self._vae, self._host.device
        latent = vae_latent_for(picture)
        need = vae.memory_used_decode(latent.shape, arithmetic.dtype)
        comfy.model_management.load_models_gpu([vae.patcher], memory_required=need)
        model = vae.first_stage_model
        if prefer is not None:
            model = LeanVAE.execute(vae, prefer).args[0].first_stage_model
        given = latent.to(device, arithmetic.dtype)
        with ExitStack() as until:
            until.enter_context(computing_in(vae.first_stage_model, arithmetic))
            if arithmetic is EXACT:  # whatever attention the host has chosen for its VAE
                attn = vae.first_stage_model.decoder.mid.attn_1
                plain = mock.patch.object(attn, "optimized_attention", kl.normal_attention)
                until.enter_context(plain)
            meter = Meter(device)
            before = meter.mark()
            made = model.decode(given)
            seconds = meter.seconds(before, meter.mark())
            return made.cpu(), seconds
