"""Prompts with VRAM Probes on the host's own executor and server object, without a port."""

from __future__ import annotations

import asyncio
import itertools
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .loading import FOLDER, SAME, load, write_tiny_vae

PROBE = "ZImageVRAMProbe"
EVENT = "z_image_low_vram.probe"
CLIENT = "the-page-that-asked"
MIB = 2**20
_numbers = itertools.count()


class Bench:
    """Runs prompts one after the other, as the host's worker thread does."""

    def __init__(self, executor: Any, server: Any, loop: Any) -> None:
        self.executor = executor
        self.server = server
        self.loop = loop
        self.prompt_id = ""

    def run(self, prompt: dict[str, Any], *, client: str | None = CLIENT) -> dict[str, Any]:
        """Runs a prompt; returns what the history gets: outputs by node."""
        self.prompt_id = f"prompt-{next(_numbers)}"
        extra = {} if client is None else {"client_id": client}
        outputs = [i for i, n in prompt.items() if n["class_type"] in (PROBE, "PreviewAny")]
        self.executor.execute(prompt, self.prompt_id, extra, outputs)
        return self.executor.history_result["outputs"]

    def record(self, prompt: dict[str, Any], node_id: str, **options: Any) -> dict[str, Any]:
        """Runs a prompt and returns a probe's record from its history."""
        (record,) = self.run(prompt, **options)[node_id]["z_image_vram_probe"]
        return record

    def sent(self, event: str = EVENT) -> list[tuple[dict[str, Any], str | None]]:
        """Data and receiver of every such message since the last call."""
        # What a probe sees too soon after its last event waits for up to an eighth of a second.
        self.loop.run_until_complete(asyncio.sleep(0.14))
        found = []
        while not self.server.messages.empty():
            name, data, receiver = self.server.messages.get_nowait()
            if name == event:
                found.append((data, receiver))
        return found

    @property
    def error(self) -> dict[str, Any] | None:
        """The message of a failed prompt."""
        messages = dict(self.executor.status_messages)
        return messages.get("execution_error") or messages.get("execution_interrupted")


class Clock:
    """Seconds that do not depend on the machine: each question takes three milliseconds."""

    now = 100.0

    def __call__(self) -> float:
        self.now += 0.003
        return self.now


def clocked(monkeypatch: Any) -> Clock:
    """Gives the probes of samplings, and the pace of their events, a clock of their own."""
    from pack.nodes.host.probe import events, wrappers
    from pack.nodes.probe.recorder import Pace, Recorder

    clock = Clock()
    monkeypatch.setattr(events, "Pace", lambda per_second: Pace(per_second, clock))
    monkeypatch.setattr(wrappers, "Recorder", lambda blank: Recorder(blank, clock))
    return clock


@contextmanager
def bench(host: Any) -> Iterator[Bench]:
    """A server object and an executor of the host, and our nodes among the host's."""
    import execution
    from pack.nodes.extension import ZImageLowVRAM
    from server import PromptServer

    ours = {n.GET_SCHEMA().node_id: n for n in asyncio.run(ZImageLowVRAM().get_node_list())}
    added = {**ours, "PreviewAny": _preview_any(), "ProbeTestSource": _Source}
    mappings = host.nodes.NODE_CLASS_MAPPINGS
    before = dict(mappings)
    instance = getattr(PromptServer, "instance", None)
    loop = asyncio.new_event_loop()
    try:
        mappings.update(added)
        server = PromptServer(loop)
        args = {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        executor = execution.PromptExecutor(
            server, cache_type=execution.CacheType.CLASSIC, cache_args=args
        )
        yield Bench(executor, server, loop)
    finally:
        mappings.clear()
        mappings.update(before)
        if instance is None:
            del PromptServer.instance
        else:
            PromptServer.instance = instance
        loop.close()


def _preview_any() -> Any:
    from comfy_extras.nodes_preview_any import PreviewAny

    return PreviewAny


class _Source:
    """A node of its own pack: gives an object that the test put on the shelf."""

    shelf: dict[str, Any] = {}  # noqa: RUF012 (the host makes the instance)
    RETURN_TYPES = ("*",)
    FUNCTION = "give"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        return {"required": {"name": ("STRING", {}), "turn": ("INT", {"default": 0})}}

    def give(self, name: str, turn: int) -> tuple[Any]:
        value = self.shelf[name]
        return (value() if callable(value) else value,)


def shelf(**values: Any) -> None:
    _Source.shelf.update(values)


def source(name: str, turn: int = 0) -> dict[str, Any]:
    return {"class_type": "ProbeTestSource", "inputs": {"name": name, "turn": turn}}


def probe(value: list[Any] | None = None, **settings: Any) -> dict[str, Any]:
    inputs = {
        "label": "",
        "mode": "measure and reset peak",
        "detail": "steps",
        "history": "off",
        **settings,
    }
    if value is not None:
        inputs["value"] = value
    return {"class_type": PROBE, "inputs": inputs}


def sampler(model: list[Any], *, steps: int = 2, seed: int = 1) -> dict[str, Any]:
    return {
        "class_type": "KSampler",
        "inputs": {
            "model": model,
            "positive": ["text", 0],
            "negative": ["text", 0],
            "latent_image": ["latent", 0],
            "seed": seed,
            "steps": steps,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "denoise": 1.0,
        },
    }


def sampling(loaded: Any, *, seed: int = 1, steps: int = 2, **settings: Any) -> dict[str, Any]:
    """A probe on the model's wire and a sampler behind it; the models stand on the shelf."""
    shelf(model=loaded.model, clip=loaded.clip, vae=loaded.vae)
    return {
        "model": source("model"),
        "clip": source("clip"),
        "text": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["clip", 0], "text": "a"}},
        "latent": {
            "class_type": "EmptyLatentImage",
            "inputs": {"width": 128, "height": 128, "batch_size": 1},
        },
        "probe": probe(["model", 0], label="sample", **settings),
        "sampler": sampler(["probe", 0], seed=seed, steps=steps),
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["sampler", 0]}},
    }


def three_probes(loaded: Any, *, seed: int = 1) -> dict[str, Any]:
    """Text encode, sample, decode: a probe behind each."""
    prompt = sampling(loaded, seed=seed)
    del prompt["probe"], prompt["shown"]
    prompt["vae"] = source("vae")
    prompt["1"] = probe(["text", 0], label="text encode")
    prompt["sampler"] = sampler(["model", 0], seed=seed)
    prompt["sampler"]["inputs"]["positive"] = ["1", 0]
    prompt["2"] = probe(["sampler", 0], label="sample")
    decode = {"samples": ["2", 0], "vae": ["vae", 0]}
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": decode}
    prompt["3"] = probe(["decode", 0], label="decode")
    return prompt


def models(host: Any) -> Any:
    return load(FOLDER, SAME, write_tiny_vae(host).name)


def is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def can_reset() -> bool:
    from pack.nodes.host.probe import device as probe_device

    return probe_device.gauge_of(torch.device("cpu")).reset is not None


def resident(mib: int) -> None:
    """Takes so much memory from the system and gives it back.

    Not a tensor's: the allocator would rather take what an earlier test has left in its heap, and
    then the process does not grow.
    """
    with mmap.mmap(-1, mib * MIB) as memory:
        memory[:: mmap.PAGESIZE] = bytes(mib * MIB // mmap.PAGESIZE)
