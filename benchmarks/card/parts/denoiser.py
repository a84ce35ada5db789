"""Peak and time of a sampling step: the host and each setting of our nodes in turn.

Variants of a case run one after the other, round after round, so that the card's clock and
temperature are the same for all of one round; ratios are taken within a round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from ..host import Host, start
from ..job import Job, Picture
from ..profiling import counted
from ..rows import NotMeasuredError, Recorder
from ..sampling import noise_for, prompt_for, sample
from ..variants import DEFAULT, HOST, SMALLEST, SPEED, make

PAIR = (HOST, DEFAULT)
FAST = (HOST, SPEED, DEFAULT, "+ Attention Slice auto", "Fit to VRAM speed", "Fit to VRAM balance")
# One head at a time: thousands of launches a block, so they are measured once.
SLOW = (HOST, SMALLEST, "+ Attention Slice max", "Fit to VRAM smallest")


class Case(NamedTuple):
    """What is compared.

    steps: that are measured, after the warm-up.
    rounds: the numbers of the rounds.
    names: of the variants, in their order within a round.
    """

    picture: Picture
    steps: int
    rounds: range
    names: tuple[str, ...]


CASES = (
    Case(Picture(1024, 1024), 4, range(3), FAST),
    Case(Picture(512, 512, 4), 4, range(3), FAST),
    Case(Picture(2048, 2048), 2, range(2), FAST),
    Case(Picture(1024, 1024), 2, range(3, 4), SLOW),
    Case(Picture(2048, 2048), 1, range(2, 3), (HOST, SMALLEST)),
    Case(Picture(4096, 4096), 1, range(1), (*PAIR, "Fit to VRAM balance")),
)
REHEARSED = (
    Case(Picture(128, 128), 1, range(2), FAST),
    Case(Picture(64, 64, 2), 1, range(1), SLOW),
)
WEIGHTS_CASE = Case(Picture(1024, 1024), 3, range(2), PAIR)
WEIGHTS_REHEARSED = Case(Picture(64, 64), 1, range(1), PAIR)
STACKS = ("layers", "noise_refiner", "context_refiner")


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    is_whole = job.leg.name == "dynamic VRAM"
    cases = REHEARSED if job.is_rehearsal else CASES if is_whole else CASES[:1]
    model = host.load("whole").model
    for case in cases:
        compare(host, rows, str(case.picture), model, case)
    if is_whole:
        del model
        host.unload()
        other_weights(host, rows)
        model = host.load("whole").model
    count_launches(host, rows, model, cases[0])  # last: a profiler is what could take all down


def compare(host: Host, rows: Recorder, title: str, model: Any, case: Case) -> None:
    """Rows of every variant and round of a case; what ran out of memory is not tried again."""
    patched: dict[str, Any] = {}
    for index, name in rows.turns(title, case.names, case.rounds):
        host.settle()
        with rows.attempt(title, name, index) as figures:
            if name not in patched:
                patched[name] = make(name, model)
            found = sample(host, patched[name], case.picture, steps=case.steps)
            figures |= found.figures()
        if not rows.has(title, name, index):
            host.unload()  # as the host does after an error


def count_launches(host: Host, rows: Recorder, model: Any, case: Case) -> None:
    """Rows of kernels launched in one step, by torch's profiler; on the CPU operations."""
    title = f"{case.picture} launches"
    for name in case.names:
        if not rows.has(title, name):
            with rows.attempt(title, name) as figures:
                figures |= launches(host, make(name, model), case.picture)


def launches(host: Host, model: Any, picture: Picture) -> dict[str, Any]:
    """Kernels of the second of two steps, see `profiling.counted`."""
    import comfy.sample

    noise, prompt = noise_for(picture), prompt_for(model)
    figures: dict[str, Any] = {}
    with ExitStack() as until:

        def after_step(index: int, *_: Any) -> None:
            if index == 0:
                if host.device.type == "cuda":
                    torch.cuda.synchronize(host.device)
                until.enter_context(counted(host.device, figures))
            else:
                until.close()

        with torch.inference_mode():
            comfy.sample.sample(
                model, noise, 2, 1.0, "euler", "simple", prompt, prompt, torch.zeros_like(noise),
                seed=1, disable_pbar=True, callback=after_step,
            )  # fmt: skip
    return figures


def other_weights(host: Host, rows: Recorder) -> None:
    """Rows of the host and our default with weights in fp8, scaled fp8, int8, and with a LoRA."""
    case = WEIGHTS_REHEARSED if host.job.is_rehearsal else WEIGHTS_CASE
    loaders: dict[str, Callable[[], Any]] = {
        "fp8": lambda: host.load("whole", weight_dtype="fp8_e4m3fn").model,
        "scaled fp8": lambda: quantised(host, "float8_e4m3fn"),
        "int8": lambda: quantised(host, "int8_tensorwise"),
        "LoRA": lambda: with_lora(host.load("whole").model),
    }
    for weights, load in loaders.items():
        title = f"{case.picture} {weights}"
        if all(rows.has(title, name, index) for name in PAIR for index in case.rounds):
            continue
        model = None
        with rows.attempt(title, "loading") as figures:
            begin = time.perf_counter()
            model = load()
            figures["seconds"] = time.perf_counter() - begin
        if model is not None:
            compare(host, rows, title, model, case)
        del model
        host.unload()


def quantised(host: Host, algorithm: str) -> Any:
    """The transformer with the linear layers of its blocks in the host's quantised format.

    Raises:
        NotMeasuredError: the host has no such format, or the weights are no single file.
    """
    import comfy.sd
    import comfy.utils
    import folder_paths
    from comfy.quant_ops import QUANT_ALGOS
    from pack.testing import lean_models

    if algorithm not in QUANT_ALGOS:
        raise NotMeasuredError(f"this ComfyUI has no {algorithm}")
    name = host.models("whole").diffusion_model
    path = None if name.endswith("/") else folder_paths.get_full_path("diffusion_models", name)
    if path is None:
        raise NotMeasuredError("quantised weights are made of a single file, and this is a folder")
    made = lean_models.quantised(comfy.utils.load_torch_file(path), algorithm, host.device)
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model_state_dict(made)


def with_lora(model: Any, *, rank: int = 16, strength: float = 0.7) -> Any:
    """The model with one random LoRA on the linear layers of every block.

    Raises:
        RuntimeError: the host found no layer for it.
    """
    import comfy.sd

    generator = torch.Generator().manual_seed(3)
    file: dict[str, torch.Tensor] = {}
    for name, module in model.get_model_object("diffusion_model").named_modules():
        if name.startswith(STACKS) and isinstance(module, torch.nn.Linear):
            down = torch.randn(rank, module.in_features, generator=generator)
            up = 0.01 * torch.randn(module.out_features, rank, generator=generator)
            file[f"diffusion_model.{name}.lora_A.weight"] = down
            file[f"diffusion_model.{name}.lora_B.weight"] = up
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(model, None, file, strength, 0.0)[0]
    if len(patched.patches) < len(file) // 2:
        raise RuntimeError(f"{len(file) // 2} layers must be patched, {len(patched.patches)} are")
    return patched
