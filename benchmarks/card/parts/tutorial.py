"""The tutorial's two rows by its own method, beside the host and our nodes: peak and seconds.

The tutorial wraps the model in `torch.utils.checkpoint` (`use_reentrant=False`) and reports the
peak with all weights. So each run samples 8 steps and decodes, with the text encoder, transformer
and VAE on the card if they fit together, as its pipeline keeps them; on a smaller card the host
sends some to RAM, and the row says how many bytes of weights were there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..host import Host, Loaded, start
from ..job import Job, Picture
from ..rows import Recorder
from ..sampling import Meter, noise_for, prompt_for
from ..variants import DEFAULT, HOST, lean_vae, make

STEPS = 8
ROUNDS = 2
CASES = (Picture(1024, 1024), Picture(512, 512, 4))
REHEARSED = (Picture(64, 64), Picture(64, 64, 2))
CHECKPOINTED = "torch.utils.checkpoint"
OURS = f"{DEFAULT} + Lean VAE"


class Way(NamedTuple):
    """What a variant samples with and decodes with."""

    model: Any
    vae: Any


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    loaded = host.load("whole")
    ways: dict[str, Callable[[], Way]] = {
        HOST: lambda: Way(loaded.model, loaded.vae),
        CHECKPOINTED: lambda: Way(checkpointed(loaded.model), loaded.vae),
        OURS: lambda: Way(make(DEFAULT, loaded.model), lean_vae(loaded.vae)),
    }
    cases, steps = (REHEARSED, 2) if job.is_rehearsal else (CASES, STEPS)
    for picture in cases:
        is_warm, case = False, str(picture)
        for index, name in rows.turns(case, ways, range(1 if job.is_rehearsal else ROUNDS)):
            if not is_warm:
                warm_up(host, loaded, ways[HOST](), picture)
                is_warm = True
            host.settle()
            with rows.attempt(case, name, index) as figures:
                figures |= whole_run(host, loaded, ways[name](), picture, steps)


def warm_up(host: Host, loaded: Loaded, way: Way, picture: Picture) -> None:
    """Loads kernels and allocates workspaces, so that the first way does not pay for them."""
    try:
        whole_run(host, loaded, way, picture, steps=2)
    except torch.OutOfMemoryError:
        host.unload()  # the way's own row will say so


def checkpointed(model: Any) -> Any:
    """The model behind `torch.utils.checkpoint`, around its whole forward, as in the tutorial."""
    from comfy.patcher_extension import WrappersMP
    from torch.utils.checkpoint import checkpoint

    def wrapped(executor: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(executor, *args, use_reentrant=False, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "benchmark.tutorial", wrapped)
    return clone


def whole_run(host: Host, loaded: Loaded, way: Way, picture: Picture, steps: int) -> dict[str, Any]:
    """Samples and decodes with all models loaded; figures of the whole."""
    import comfy.model_management
    import comfy.sample

    patchers = [loaded.clip.patcher, way.vae.patcher, way.model]
    noise, prompt = noise_for(picture), prompt_for(way.model)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu(patchers)
        meter = Meter(host.device)
        start_mark = meter.mark()
        latent = comfy.sample.sample(
            way.model, noise, steps, 1.0, "euler", "simple", prompt, prompt,
            torch.zeros_like(noise), seed=1, disable_pbar=True,
        )  # fmt: skip
        sampled_mark = meter.mark()
        pixels = way.vae.decode(latent)
        end_mark = meter.mark()
        seconds = meter.seconds(start_mark, end_mark)
    if not pixels.isfinite().all():
        raise RuntimeError("the decoded picture is not finite")
    weights, memory = sum(patcher.loaded_size() for patcher in patchers), meter.memory()
    return {
        "steps": steps,
        "seconds": seconds,
        "sampling_s": meter.seconds(start_mark, sampled_mark),
        "peak_bytes": memory["allocated_bytes"],
        "activation_peak_bytes": memory["peak_bytes"],
        "reserved_bytes": memory["reserved_bytes"],
        "weight_bytes": weights if meter.is_card else None,
    }
