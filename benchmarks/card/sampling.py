"""Whole samplings through the host, measured: seconds and bytes of the steps after the warm-up."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Any, NamedTuple

import torch

from .host import Host
from .job import Picture

TEXT_TOKENS = 256
MEMORY = ("peak_bytes", "reserved_bytes", "allocated_bytes", "workspace_bytes", "weights_bytes")


class Sampled(NamedTuple):
    """One sampling.

    step_s: of each step after the warm-up, by CUDA events; on the CPU by the clock.
    cpu_step_s: of the same steps, what the thread that issues them took of its processor; a driver
        that waits busily for the card counts too.
    memory: of the same steps, see `Meter.memory`.
    latent: the result, on the CPU.
    """

    step_s: list[float]
    cpu_step_s: list[float]
    memory: dict[str, int | None]
    latent: torch.Tensor

    def figures(self) -> dict[str, Any]:
        """As the figures of a row; the seconds are medians."""
        return {
            "step_s": statistics.median(self.step_s),
            "cpu_step_s": statistics.median(self.cpu_step_s),
            "steps": len(self.step_s),
            **self.memory,
        }


class Meter:
    """Bytes and times of a stretch of work on the host's device; without a card only times."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.is_card = device, device.type == "cuda"
        self._before = 0
        self.restart()

    def restart(self) -> None:
        """Peaks count from here on."""
        if self.is_card:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)

    def mark(self) -> Any:
        """This moment in the stream of the device, for `seconds`; does not wait."""
        if not self.is_card:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second one."""
        if not self.is_card:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def memory(self, patcher: Any = None) -> dict[str, int | None]:
        """Bytes since the restart as figures of a row; None without a card.

        peak_bytes: allocated at most, above what was there at the restart.
        allocated_bytes: allocated at most, all in all.
        reserved_bytes: held by torch's allocator at most.
        workspace_bytes: reserved beyond what was allocated.
        weights_bytes: of the patcher's weights, those that are in the three above now; the pages of
            dynamic VRAM are not.
        """
        if not self.is_card:
            return dict.fromkeys(MEMORY)
        allocated = torch.cuda.max_memory_allocated(self._device)
        reserved = torch.cuda.max_memory_reserved(self._device)
        return {
            "peak_bytes": allocated - self._before,
            "reserved_bytes": reserved,
            "allocated_bytes": allocated,
            "workspace_bytes": reserved - allocated,
            "weights_bytes": None if patcher is None else patcher.model.model_loaded_weight_memory,
        }


def text_width(model: Any) -> int:
    """Width of the text encoder's hidden states that this model takes."""
    return model.get_model_object("diffusion_model").cap_embedder[1].in_features


def noise_for(picture: Picture) -> torch.Tensor:
    """Latent noise [B, 16, H/8, W/8], float32, on the CPU; always the same."""
    generator = torch.Generator().manual_seed(1)
    shape = (picture.batch, 16, picture.height_px // 8, picture.width_px // 8)
    return torch.randn(shape, generator=generator)


def vae_latent_for(picture: Picture) -> torch.Tensor:
    """A random latent as samplers hand it to the VAE: noise at the scale and shift of Flux's."""
    from comfy.latent_formats import Flux

    return Flux().process_out(noise_for(picture))


def prompt_for(model: Any) -> list[Any]:
    """A conditioning of random hidden states [1, T, C], float32."""
    generator = torch.Generator().manual_seed(2)
    return [[torch.randn(1, TEXT_TOKENS, text_width(model), generator=generator), {}]]


def sample(host: Host, model: Any, picture: Picture, *, steps: int) -> Sampled:
    """Samples as KSampler does, cfg 1, and measures so many steps after one of warm-up.

    Raises:
        RuntimeError: the result is not finite.
    """
    import comfy.sample

    meter = Meter(host.device)
    marks: list[tuple[Any, float]] = []

    def after_step(step: int, *_: Any) -> None:
        if step == 0:
            meter.restart()
        marks.append((meter.mark(), time.thread_time()))

    noise, prompt = noise_for(picture), prompt_for(model)
    with torch.inference_mode():
        latent = comfy.sample.sample(
            model, noise, 1 + steps, 1.0, "euler", "simple", prompt, prompt,
            torch.zeros_like(noise), seed=1, disable_pbar=True, callback=after_step,
        )  # fmt: skip
    measured = list(itertools.pairwise(marks))
    found = Sampled(
        [meter.seconds(a[0], b[0]) for a, b in measured],
        [b[1] - a[1] for a, b in measured],
        meter.memory(model),
        latent.cpu(),
    )
    if not found.latent.isfinite().all():
        raise RuntimeError("the sampled latent is not finite")
    return found
