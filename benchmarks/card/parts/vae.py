"""Decode and encode: the host, its tile nodes and each setting of Lean VAE in turn.

A small decode and encode first load cuDNN and bring the VAE to the card, where it stays. Each way
starts with an empty allocator and is called twice: `first_s` is the first call (in round 0 cuDNN
chooses its algorithms in it), `seconds` and the bytes are of the second. In the last round each
result is compared with the host's of that round. All results lie on the CPU, where the host puts
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from pack.runner.model_files import SAME_FOLDER

from ...vae_ways import TILED, TILES, tile_edges
from ..host import Host, start
from ..job import Job, Picture
from ..profiling import counted
from ..rows import Recorder
from ..sampling import MEMORY, Meter, vae_latent_for
from ..variants import HOST, lean_vae
from . import vae_difference

TASKS = ("decode", "encode")
# Picture, rounds.
CASES = ((Picture(1024, 1024), 3), (Picture(2048, 2048), 2))
REHEARSED = ((Picture(32, 32), 1),)
WARM_UP = Picture(32, 32)
PREFERENCES = ("speed", "balance", "smallest")
TILE_NODES = {"decode": TILED, "encode": "VAEEncodeTiled"}
FIGURES = (
    "first_s", "seconds", *MEMORY, "is_repeatable", *vae_difference.FIGURES, "clamped", "note",
)  # fmt: skip

Work = Callable[[torch.Tensor], torch.Tensor]


class Way(NamedTuple):
    """One way to decode or encode.

    work: from a latent [B, 16, H/8, W/8] to pictures [B, H, W, 3] or back, float32, on the CPU.
    edges: rows at which tiles or strips of a decoded picture end, for a side in pixels.
    is_tiled: the same holds for columns.
    """

    work: Work
    edges: Callable[[int], Sequence[int]]
    is_tiled: bool = False


class Result(NamedTuple):
    """What a way made, and what was said while it did."""

    tensor: torch.Tensor
    notes: list[str]


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    vae = load_vae(host)
    rows.facts["dtype"] = str(vae.vae_dtype).removeprefix("torch.")
    cases = REHEARSED if job.is_rehearsal else CASES
    with torch.inference_mode():
        for task in TASKS:
            getattr(vae, task)(given_for(task, WARM_UP))
        for task in TASKS:
            for picture, rounds in cases:
                compare(host, rows, vae, task, picture, rounds)
        for task in TASKS[: 1 if job.is_rehearsal else None]:
            count_launches(host, rows, vae, task, cases[0][0])


def load_vae(host: Host) -> Any:
    """The VAE alone, as the host's Load VAE makes it."""
    from pack.nodes.host.loader import choices
    from pack.nodes.host.loader import load as loaders

    is_written = (host.job.work / "models" / "whole").is_dir()
    found = host.models("whole" if is_written else "short")
    choice = found.diffusion_model if found.vae == SAME_FOLDER else found.vae
    return loaders.load_vae(choices.open_part("vae", choice, choices.folders()))


def given_for(task: str, picture: Picture) -> torch.Tensor:
    """A latent [B, 16, H/8, W/8] as samplers give it, or pictures [B, H, W, 3] of random values."""
    if task == "decode":
        return vae_latent_for(picture)
    shape = (picture.batch, picture.height_px, picture.width_px, 3)
    return torch.rand(shape, generator=torch.Generator().manual_seed(4))


def names_of(task: str) -> tuple[str, ...]:
    """The variants of a task, in the order of the tables."""
    return (HOST, TILE_NODES[task], *(f"Lean VAE {prefer}" for prefer in PREFERENCES))


def make(name: str, vae: Any, task: str) -> Way:
    """A variant of a task.

    Raises:
        RuntimeError: Lean VAE leaves this VAE as it is.
    """
    if name == HOST:
        return Way(getattr(vae, task), lambda side: ())
    if name == TILE_NODES[task]:
        return Way(tiled(vae, task), _tile_edges, is_tiled=True)
    from pack.nodes.host.vae.patch import example_call
    from pack.nodes.vae.choice import VaeChoice

    prefer: Any = name.rsplit(" ", 1)[-1]
    lean = lean_vae(vae, prefer)
    if lean is vae:
        raise RuntimeError("Lean VAE leaves this VAE as it is")

    def edges(side: int) -> Sequence[int]:
        plan = VaeChoice(prefer, 0).plan(example_call(lean, side))
        rows = side if plan is None else plan.levels[-1].limit
        return range(rows, side, rows)

    return Way(getattr(lean, task), edges)


def tiled(vae: Any, task: str) -> Work:
    """The host's node for tiles with the settings that it has when it is put into a graph."""
    import nodes

    node = getattr(nodes, TILE_NODES[task])
    required = node.INPUT_TYPES()["required"]
    settings = {k: v[1]["default"] for k, v in required.items() if len(v) > 1}

    def work(given: torch.Tensor) -> torch.Tensor:
        inputs = {"samples": {"samples": given}} if task == "decode" else {"pixels": given}
        (result,) = getattr(node(), node.FUNCTION)(vae=vae, **inputs, **settings)
        return result if task == "decode" else result["samples"]

    return work


def _tile_edges(side: int) -> list[int]:
    return sorted({8 * edge for edge in tile_edges(side // 8, *TILES[TILED])})


def compare(host: Host, rows: Recorder, vae: Any, task: str, picture: Picture, rounds: int) -> None:
    """Rows of every variant and round of a case; what ran out of memory is not tried again."""
    case, names = f"{picture} {task}", names_of(task)
    given = given_for(task, picture)
    of_host: Result | None = None
    for index, name in rows.turns(case, names, range(rounds)):
        host.settle()
        with rows.attempt(case, name, index) as figures:
            figures |= dict.fromkeys(FIGURES)
            way = make(name, vae, task)
            result = Result(measure(host, vae, way, given, figures), list(rows.notes))
            if index == rounds - 1:
                judge(result, of_host, name, task, way, figures)
                of_host = result if name == HOST else of_host


def judge(
    result: Result, of_host: Result | None, name: str, task: str, way: Way, figures: dict[str, Any]
) -> None:
    """Fills in how far a result is from the host's; what is said of pixels is None for a latent."""
    made = result.tensor
    if task == "decode":
        figures["clamped"] = vae_difference.clamped(made)
    if name == HOST:
        return
    if of_host is None:
        figures["note"] = "no result of ComfyUI to compare with"
        return
    told = [f"ComfyUI, with which it is compared: {text}" for text in of_host.notes]
    figures["note"] = "; ".join(told) or None
    if task == "encode":
        figures |= vae_difference.latent_difference(made, of_host.tensor)
    else:
        edges = way.edges(made.shape[1])
        figures |= vae_difference.picture_difference(
            made, of_host.tensor, edges=edges, is_tiled=way.is_tiled
        )


def measure(
    host: Host, vae: Any, way: Way, given: torch.Tensor, figures: dict[str, Any]
) -> torch.Tensor:
    """Calls it twice and fills in the times of both, and the bytes of the second.

    Raises:
        RuntimeError: the result is not finite.
    """
    meter = Meter(host.device)

    def timed() -> tuple[float, torch.Tensor]:
        meter.restart()
        begin = meter.mark()
        tensor = way.work(given)
        return meter.seconds(begin, meter.mark()), tensor

    figures["first_s"], first = timed()
    figures["seconds"], tensor = timed()
    figures |= meter.memory(vae.patcher)
    figures["is_repeatable"] = torch.equal(first, tensor)
    if not tensor.isfinite().all():
        raise RuntimeError("the result is not finite")
    return tensor


def count_launches(host: Host, rows: Recorder, vae: Any, task: str, picture: Picture) -> None:
    """Rows of kernels launched by one call, by torch's profiler; on the CPU operations."""
    case, given = f"{picture} {task} launches", given_for(task, picture)
    names = names_of(task)
    if all(rows.has(case, name) for name in names):
        return
    getattr(vae, task)(given_for(task, WARM_UP))  # the weights are on the card after it
    for name in names:
        work = make(name, vae, task).work
        with rows.attempt(case, name) as figures, counted(host.device, figures):
            work(given)
