"""Training a LoRA: the host's Train LoRA node without and with its checkpointing, and with ours.

The node itself runs, as in a graph: three steps of one picture, rank 8, bfloat16. It makes a copy
of the model with weights of its own, read from the file again, so `node_s` is mostly loading. The
bytes and `seconds` (of one step, first included) are of its training loop, `step_s` of the steps
after the first.

Dynamic VRAM, as users have it. The node asks for a full load, which a dynamic model ignores: the
weights stay in pages outside of torch's allocator, which yield to training. So torch's bytes are
activations, gradients, the LoRA, the optimiser's state, and the copies of weights with the LoRA
added, which autograd keeps unless they are computed again. Dynamic VRAM moves small weights to the
card without what the node adds to them: `untrained_tensors` counts what stayed zero.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch

from ..host import Host, start
from ..job import Job, Picture
from ..rows import Recorder, read
from ..sampling import Meter, prompt_for, vae_latent_for
from ..variants import DEFAULT, HOST, make

CASES = (Picture(512, 512), Picture(1024, 1024))
REHEARSED = (Picture(64, 64),)
STEPS, RANK, SEED = 3, 8, 7
_KEY = "benchmarks.card.training"


class Way(NamedTuple):
    """A way to train.

    model: the variant of the model.
    inputs: of the host's node.
    """

    model: str
    inputs: dict[str, Any]


OFF = {"gradient_checkpointing": False}
# First the two that save most; the others may run out of memory.
WAYS = {
    f"{HOST}, depth 2": Way(HOST, {"gradient_checkpointing": True, "checkpoint_depth": 2}),
    DEFAULT: Way(DEFAULT, OFF),
    f"{HOST}, depth 1": Way(HOST, {"gradient_checkpointing": True, "checkpoint_depth": 1}),
    f"{HOST}, no checkpointing": Way(HOST, OFF),
}
FIGURES = (
    "seconds", "step_s", "node_s", "steps", "peak_bytes", "reserved_bytes", "allocated_bytes",
    "workspace_bytes", "loss_first", "loss", "losses", "loss_relative_difference",
    "lora_tensors", "untrained_tensors",
)  # fmt: skip


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    rows.facts["dtype"] = "bfloat16"  # on the CPU too, the node asks for it
    model = host.load("whole").model
    for picture in REHEARSED if job.is_rehearsal else CASES:
        compare(host, rows, model, picture)


def compare(host: Host, rows: Recorder, model: Any, picture: Picture) -> None:
    """Rows of every way; losses are compared with those of the first one that did not fail."""
    case = str(picture)
    wanted: list[float] | None = None
    for name, way in WAYS.items():
        if rows.has(case, name):
            wanted = wanted or losses_before(host.job, case, name)
            continue
        host.unload()
        with rows.attempt(case, name) as figures:
            figures |= dict.fromkeys(FIGURES)
            train(host, make(way.model, model), picture, way.inputs, figures)
            wanted = wanted or figures["losses"]
            pairs = zip(figures["losses"], wanted, strict=True)
            figures["loss_relative_difference"] = max(abs(a - b) / abs(b) for a, b in pairs)
            check_unpatched(model)
    host.unload()


def losses_before(job: Job, case: str, variant: str) -> list[float] | None:
    """What an earlier start of the campaign measured; the last row counts."""
    wanted = (job.leg.part, job.leg.name, case, variant, None)
    for row in reversed(read(job.rows_path)):
        if tuple(row.get(key) for key in ("part", "leg", "case", "variant", "error")) == wanted:
            return row.get("losses")
    return None


def train(
    host: Host, model: Any, picture: Picture, inputs: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Runs the host's node and fills in what it took.

    Raises:
        RuntimeError: the node did not train so many steps, or a loss is not finite.
    """
    import comfy.utils
    from comfy.patcher_extension import WrappersMP
    from comfy_extras.nodes_train import TrainLoraNode

    meter = Meter(host.device)
    loop: list[Any] = []  # its begin and end
    steps: list[Any] = []  # the ends of the first one, the last one, and some between

    def around(executor: Any, *args: Any, **kwargs: Any) -> Any:
        meter.restart()
        loop.append(meter.mark())
        made = executor(*args, **kwargs)
        loop.append(meter.mark())
        figures.update(meter.memory())
        return made

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, _KEY, around)
    schema = TrainLoraNode.define_schema()
    given = {
        **{item.id: getattr(item, "default", None) for item in schema.inputs},
        "model": watched,
        "latents": {"samples": vae_latent_for(picture)},
        "positive": prompt_for(model),
        "batch_size": 1, "steps": STEPS, "rank": RANK, "seed": SEED,
        "training_dtype": "bf16", "lora_dtype": "bf16",
        **inputs,
    }  # fmt: skip
    comfy.utils.set_progress_bar_enabled(False)  # tqdm's
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: steps.append(meter.mark()))
    # The node's seed is of the noise; the LoRA starts from torch's.
    torch.manual_seed(SEED)
    begin = time.perf_counter()
    try:
        with torch.inference_mode():
            lora, told, _ = TrainLoraNode.execute(**{k: [v] for k, v in given.items()}).args
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.utils.set_progress_bar_enabled(True)
    figures["node_s"] = time.perf_counter() - begin
    losses = told["loss"]
    if len(losses) != STEPS or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"{STEPS} finite losses were expected, got {losses}")
    figures |= {"losses": losses, "loss_first": losses[0], "loss": losses[-1], "steps": STEPS}
    figures["seconds"] = meter.seconds(*loop) / STEPS
    figures["step_s"] = meter.seconds(steps[0], steps[-1]) / (STEPS - 1)
    # A LoRA's second factor and what is added to a vector start at zero.
    figures["lora_tensors"] = len(lora)
    figures["untrained_tensors"] = sum(not tensor.any() for tensor in lora.values())


def check_unpatched(model: Any) -> None:
    """Makes sure that a training left nothing on the model that it was given.

    Raises:
        RuntimeError: a block, a forward or a weight is still another one, or the host still trains.
    """
    import comfy.model_management
    from pack.nodes.host.denoiser.block import is_known_block, is_untouched

    denoiser = model.model.diffusion_model
    stacks = (denoiser.context_refiner, denoiser.noise_refiner, denoiser.layers)
    left = [
        name
        for name, is_left in {
            "another block": not all(
                is_known_block(block) and is_untouched(block) for stack in stacks for block in stack
            ),
            "another forward": any(hasattr(m, "org_forward") for m in denoiser.modules()),
            "a LoRA": any(getattr(m, "weight_function", None) for m in denoiser.modules()),
            "the host's mark of training": comfy.model_management.in_training,
        }.items()
        if is_left
    ]
    if left:
        raise RuntimeError(f"the training left on the model: {', '.join(left)}")
