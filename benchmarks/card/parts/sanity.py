"""Whether everything works on this card at all: each node once, at a small size, against the host.

First a row per node; then weights streamed from RAM, by the host and by our default; where the host
loads by estimate also `exactness`. `reference` says what a row's errors are against.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import variants
from ..host import Host, Loaded, start
from ..job import Job, Picture
from ..rows import Recorder, Row
from ..sampling import Meter, Sampled, sample, vae_latent_for
from ..variants import DEFAULT, HOST, checkpoint, fit, make
from . import exactness
from .exactness import BLANK, against

START, NODE, STREAMED = "start", "node", "streamed weights"
LOADER, LEAN_VAE, PROBE = "Load Z-Image-Turbo", "Lean VAE", "VRAM Probe"
PICTURE, REHEARSED = Picture(256, 256), Picture(64, 64)
LARGE_BYTES = 2**28
# Of the weights, what may be on the card at a time while they are streamed.
SHARE = 1 / 3
EXACT_LEG = "loading by estimate"


def run(job: Job, rows: Recorder) -> None:
    host = start(job, rows)
    check_start(job, rows)
    check_counter(host, rows)
    loaded = load(host, rows)
    if loaded is None:
        return
    picture = REHEARSED if job.is_rehearsal else PICTURE
    samples = Samples(host, loaded.model, picture)
    denoiser_nodes(rows, samples)
    lean_vae(host, rows, loaded.vae, picture)
    probe(rows, samples)
    streamed(rows, samples)
    if job.leg.name == EXACT_LEG:
        exactness.run(host, rows, loaded)


@contextmanager
def measured(rows: Recorder, case: str, variant: str, **known: Any) -> Iterator[Row]:
    """`Recorder.attempt` with every field there from the start, so that an error's row has them."""
    with rows.attempt(case, variant) as figures:
        figures |= {**BLANK, **known}
        yield figures


def check_start(job: Job, rows: Recorder) -> None:
    """A row that all nodes are there, and that the host and torch run as the leg asks."""
    if rows.has(START, "imports"):
        return
    with measured(rows, START, "imports", nodes=None) as figures:
        from pack.nodes.extension import ZImageLowVRAM

        nodes = asyncio.run(ZImageLowVRAM().get_node_list())
        figures["nodes"] = [node.define_schema().node_id for node in nodes]
        if not job.is_rehearsal:
            check("allocator", rows.facts["allocator"], job.leg.allocator)


def check_counter(host: Host, rows: Recorder) -> None:
    """A row that torch's peak counter follows what is freed, by which all peaks stand and fall.

    A large tensor, freed before a small one is made: the peak must be the large one's bytes.
    """
    if rows.has(START, "allocator"):
        return
    figures_of = {"counted_bytes": None, "expected_bytes": None}
    with measured(rows, START, "allocator", **figures_of) as figures:
        meter = Meter(host.device)
        for size in (LARGE_BYTES, LARGE_BYTES // 2):
            held = torch.empty(size, dtype=torch.uint8, device=host.device)
            del held  # before the next is made
        counted = meter.memory()["peak_bytes"]
        figures |= {"counted_bytes": counted, "expected_bytes": LARGE_BYTES}
        if counted is not None and abs(counted - LARGE_BYTES) > LARGE_BYTES // 100:
            raise RuntimeError(f"torch must count {LARGE_BYTES} bytes, it counts {counted}")


def check(what: str, found: Any, wanted: Any) -> None:
    """
    Raises:
        RuntimeError: they differ.
    """
    if found != wanted:
        raise RuntimeError(f"{what} must be {wanted}, got {found}")


def load(host: Host, rows: Recorder) -> Loaded | None:
    """The models by our loader, with a row; None if they cannot be loaded."""
    import comfy.model_patcher

    if rows.has(NODE, LOADER):
        return host.load("short")
    with measured(rows, NODE, LOADER, patcher=None) as figures:
        host.models("short")  # written before the clock runs
        start_s = time.perf_counter()
        loaded = host.load("short")
        figures["seconds"] = time.perf_counter() - start_s
        dynamic = getattr(comfy.model_patcher, "ModelPatcherDynamic", ())
        figures["patcher"] = type(loaded.model).__name__
        is_dynamic = isinstance(loaded.model, dynamic)
        check("is_dynamic", is_dynamic, rows.facts["mode"] == "dynamic VRAM")
        return loaded
    return None


class Samples:
    """Samplings of one picture in two steps; those that others are compared with are kept."""

    def __init__(self, host: Host, model: Any, picture: Picture) -> None:
        self.host, self.model, self.picture = host, model, picture
        self._kept: dict[str, torch.Tensor] = {}

    def take(self, model: Any) -> Sampled:
        return sample(self.host, model, self.picture, steps=1)

    def of(self, name: str) -> torch.Tensor:
        """The latent of the host alone or of our default, its weights where the host puts them."""
        if name not in self._kept:
            self._kept[name] = self.take(make(name, self.model)).latent
        return self._kept[name]

    def compare(self, figures: Row, model: Any, name: str = HOST) -> None:
        """Fills a row with a sampling of the model and how far it is from the named one."""
        wanted = self.of(name)
        found = self.take(model)
        figures |= against(found.latent, wanted)
        figures["is_bit_equal"] = torch.equal(found.latent, wanted)
        figures["seconds"] = found.step_s[-1]


def denoiser_nodes(rows: Recorder, samples: Samples) -> None:
    """A row for each node that patches the model; each is compared with the host alone."""
    nodes: dict[str, Callable[[Any], Any]] = {
        DEFAULT: checkpoint,
        "Attention Slice": only_sliced,
        "Fit to VRAM": lambda model: fit(model, "balance"),
    }
    for name, patch in nodes.items():
        if rows.has(NODE, name):
            continue
        with measured(rows, NODE, name, reference=HOST) as figures:
            with torch.inference_mode():
                patched = patch(samples.model)
            samples.compare(figures, patched)


def only_sliced(model: Any) -> Any:
    """The host's own forward, its attention one head at a time."""
    from pack.nodes.attention_slice import AttentionSlice

    return AttentionSlice.execute(model, "max").args[0]


def lean_vae(host: Host, rows: Recorder, vae: Any, picture: Picture) -> None:
    """A row of a decode, compared with the host's of the same latent."""
    if rows.has(NODE, LEAN_VAE):
        return
    with measured(rows, NODE, LEAN_VAE, reference=HOST) as figures, torch.inference_mode():
        latent = vae_latent_for(picture)
        wanted = vae.decode(latent)
        lean = variants.lean_vae(vae)
        meter = Meter(host.device)
        before = meter.mark()
        found = lean.decode(latent)
        figures["seconds"] = meter.seconds(before, meter.mark())
        figures |= against(found, wanted)
        figures["is_bit_equal"] = torch.equal(found, wanted)


def probe(rows: Recorder, samples: Samples) -> None:
    """A row of a sampling that VRAM Probe watches."""
    from pack.nodes.vram_probe import VRAMProbe

    if rows.has(NODE, PROBE):
        return
    with measured(rows, NODE, PROBE, reference=HOST, probe_bytes=None) as figures:
        with torch.inference_mode():
            shown = VRAMProbe.execute(samples.model)
        samples.compare(figures, shown.args[0])
        record = shown.ui["z_image_vram_probe"][0]  # the node goes on writing into it
        figures["probe_bytes"] = record["peak_bytes"]
        check("the record's state", record["state"], "done")
        check("the record's steps", len(record["steps"]), 2)
        if not record["peak_bytes"]:
            raise RuntimeError("VRAM Probe recorded no peak")


def streamed(rows: Recorder, samples: Samples) -> None:
    """Rows of the host and our default with a third of the weights on the card at a time.

    Each is compared with its own result when all weights are on the card: streaming must not
    change a bit.
    """
    for name in (HOST, DEFAULT):
        if rows.has(STREAMED, name):
            continue
        limit = int(SHARE * samples.model.model_size())
        known = {"reference": f"{name}, all weights there", "resident_bytes": None}
        known |= {"limit_bytes": limit, "model_bytes": samples.model.model_size()}
        with measured(rows, STREAMED, name, **known) as figures:
            samples.of(name)  # first: it brings all weights to the card
            samples.host.unload()
            with torch.inference_mode(), limited(make(name, samples.model), limit) as model:
                samples.compare(figures, model, name)
                if samples.host.device.type == "cuda":
                    figures["resident_bytes"] = int(model.loaded_size())
                    if figures["resident_bytes"] >= figures["model_bytes"]:
                        raise RuntimeError("all weights stayed on the card: none was streamed")
    samples.host.unload()


@contextmanager
def limited(model: Any, limit_bytes: int) -> Iterator[Any]:
    """A clone whose weights on the card are bounded in each sampling, as Fit to VRAM does it."""
    from comfy.patcher_extension import WrappersMP
    from pack.nodes.host.fit import budget

    lifts: list[Callable[[], None] | None] = []

    def prepare(executor: Any, patcher: Any, *args: Any, **kwargs: Any) -> Any:
        result = executor(patcher, *args, **kwargs)
        lifts.append(budget.limit_weights(patcher, limit_bytes))
        return result

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "benchmarks.card", prepare)
    try:
        yield clone
    finally:
        for lift in lifts:
            if lift is not None:
                lift()
