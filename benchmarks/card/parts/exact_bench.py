"""Runs the table of kernels: the host's and ours beside float64, by dtype.

The rows tell where the first difference from the host comes from. Inputs are random, rounded to
bfloat16, so that every dtype gets the same numbers; the weights are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from ..host import Host, Loaded
from ..rows import Recorder
from ..sampling import Meter
from .exact_kernels import KERNELS, TOKENS, Inputs
from .exactness import BLANK, EXACT, Arithmetic, compared, computing_in

MAP_PX, REHEARSED_PX = 256, 32
_RANDOM_SEED = 5


class Bench:
    """The models and the inputs, and rows of each kernel."""

    def __init__(self, host: Host, loaded: Loaded) -> None:
        self._host, self._loaded = host, loaded
        self._drawn: Inputs | None = None

    def compare(self, rows: Recorder, arithmetic: Arithmetic) -> None:
        """A row of each kernel."""
        case = f"kernel {arithmetic}"
        if all(rows.has(case, name) for name in KERNELS):
            return
        for name, kernel in KERNELS.items():
            if rows.has(case, name):
                continue
            with rows.attempt(case, name) as figures, torch.inference_mode():
                figures |= {**BLANK, **arithmetic.facts(self._host.device)}
                self._load()
                exact, _ = self._call(kernel.whole, EXACT)
                by_host, _ = self._call(kernel.whole, arithmetic)
                found, _ = self._call(kernel.cut, arithmetic)
                figures |= compared(found, by_host, exact)
                del found, by_host, exact
                _, figures["seconds"] = self._call(kernel.cut, arithmetic)  # warm

    def _load(self) -> None:
        """Brings both models to the card, if they are not there."""
        import comfy.model_management

        model, vae = self._loaded.model, self._loaded.vae
        comfy.model_management.load_models_gpu([model, vae.patcher])

    def _call(
        self, function: Callable[[Inputs], torch.Tensor], arithmetic: Arithmetic
    ) -> tuple[torch.Tensor, float]:
        with ExitStack() as until:
            for module in (self._denoiser, self._decoder):
                until.enter_context(computing_in(module, arithmetic))
            given = self._inputs().to(arithmetic.dtype)
            meter = Meter(self._host.device)
            before = meter.mark()
            made = function(given)
            return made, meter.seconds(before, meter.mark())

    @property
    def _denoiser(self) -> Any:
        return self._loaded.model.model.diffusion_model

    @property
    def _decoder(self) -> Any:
        return self._loaded.vae.first_stage_model.decoder

    def _inputs(self) -> Inputs:
        """The same numbers at each call, in bfloat16."""
        if self._drawn is None:
            self._drawn = self._draw()
        return self._drawn

    def _draw(self) -> Inputs:
        generator = torch.Generator().manual_seed(_RANDOM_SEED)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16().to(self._host.device)

        block = self._loaded.model.get_model_object("diffusion_model.layers.0")  # the host's own
        side = REHEARSED_PX if self._host.job.is_rehearsal else MAP_PX
        width = self._decoder.norm_out.num_channels
        dim, heads, channels = block.dim, block.attention.n_local_heads, block.head_dim
        positions = torch.arange(TOKENS, dtype=torch.float32, device=self._host.device)
        table = self._denoiser.rope_embedder(positions[None, :, None].expand(1, TOKENS, 3))
        split = (1, TOKENS, heads, channels)
        return Inputs(
            block, self._decoder, drawn(1, TOKENS, dim), drawn(1, TOKENS, dim),
            table.movedim(1, 2), drawn(1, 4 * dim),
            drawn(*split), drawn(*split), drawn(*split), drawn(1, width, side, side),
        )  # fmt: skip
