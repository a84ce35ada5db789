"""The graphs of the demo in the host's API format: the example workflow, Fit to VRAM, probes."""

from __future__ import annotations

from typing import Any, NamedTuple

from .model_files import Models

Graph = dict[str, Any]
PROMPT = (
    "A red fox asleep in the snow under a birch tree, early morning light, soft long shadows, "
    "sharp fur, a photograph"
)
STEPS = 8
FIT, PROBE = "ZImageFitToVRAM", "ZImageVRAMProbe"
# Stage -> the node id of its probe.
PROBES = {"text": "21", "sampling": "22", "decode": "23"}


class Picture(NamedTuple):
    """What is to be drawn; width and height in pixels."""

    width: int
    height: int
    steps: int = STEPS
    seed: int = 0
    text: str = PROMPT


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def example_prompt(models: Models, picture: Picture) -> Graph:
    """example_workflows/z_image_turbo.json with these models and settings."""
    return {
        "1": node(
            "ZImageTurboLoader", diffusion_model=models.diffusion_model,
            text_encoder=models.text_encoder, vae=models.vae, weight_dtype="default", shift=0.0,
        ),
        "2": node("CLIPTextEncode", clip=["1", 1], text=picture.text),
        "3": node("ConditioningZeroOut", conditioning=["2", 0]),
        "4": node(
            "EmptySD3LatentImage", width=picture.width, height=picture.height, batch_size=1
        ),
        "5": node(
            "KSampler", model=["1", 0], positive=["2", 0], negative=["3", 0],
            latent_image=["4", 0], seed=picture.seed, steps=picture.steps, cfg=1.0,
            sampler_name="res_multistep", scheduler="simple", denoise=1.0,
        ),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="z_image_turbo"),
    }  # fmt: skip


def with_fit(graph: Graph, prefer: str) -> Graph:
    """With Fit to VRAM before prompt, sampler and decode, wired as in z_image_turbo_1gib.json.

    The budget is what is free.
    """
    text, sampler, decode = (graph[number]["inputs"] for number in ("2", "5", "6"))
    fit = node(
        FIT, model=sampler["model"], vae=decode["vae"], latent=["4", 0], clip=text["clip"],
        budget_gib=0.0, prefer=prefer, width=1024, height=1024, batch_size=1,
    )  # fmt: skip
    return {
        **graph,
        "9": fit,
        "2": {**graph["2"], "inputs": {**text, "clip": ["9", 3]}},
        "5": {**graph["5"], "inputs": {**sampler, "model": ["9", 0]}},
        "6": {**graph["6"], "inputs": {**decode, "vae": ["9", 1]}},
    }


def with_probes(graph: Graph, detail: str = "blocks") -> Graph:
    """With three VRAM Probes, wired as in z_image_turbo_probes.json.

    Args:
        detail: of the sampling's.
    """
    sampler = graph["5"]["inputs"]
    text, sampling, decode = PROBES.values()
    return {
        **graph,
        text: _probe(["2", 0], "text encode", "steps"),
        sampling: _probe(sampler["model"], "sample", detail),
        decode: _probe(["6", 0], "decode", "steps"),
        "3": node("ConditioningZeroOut", conditioning=[text, 0]),
        "5": {
            **graph["5"],
            "inputs": {**sampler, "model": [sampling, 0], "positive": [text, 0]},
        },
        "7": {**graph["7"], "inputs": {**graph["7"]["inputs"], "images": [decode, 0]}},
    }


def one_step(graph: Graph) -> Graph:
    """Of a graph with probes, one sampling step and no decode; every operation is watched."""
    sampling, decode = PROBES["sampling"], PROBES["decode"]
    kept = {number: each for number, each in graph.items() if number not in ("6", "7", decode)}
    watched = {**graph[sampling]["inputs"], "detail": "blocks"}
    return {
        **kept,
        sampling: {**graph[sampling], "inputs": watched},
        "5": {**graph["5"], "inputs": {**graph["5"]["inputs"], "steps": 1}},
        decode: _probe(["5", 0], "latent", "steps"),
    }


def probe_record(history: dict[str, Any], stage: str) -> dict[str, Any]:
    """What the probe of a stage says of a run.

    Raises:
        RuntimeError: it has not seen its stage to the end.
    """
    record = history["outputs"][PROBES[stage]]["z_image_vram_probe"][0]
    if record["state"] != "done":
        raise RuntimeError(f"the {stage} probe's record must be done, it is {record['state']}")
    return record


def _probe(value: list[Any], label: str, detail: str) -> dict[str, Any]:
    mode = "measure and reset peak"
    return node(PROBE, value=value, label=label, mode=mode, detail=detail, history="off")
