"""The graphs of whole runs, from text to picture, in the host's API format.

Each is benchmarks/demo.py's example with other nodes in some places.
"""

from __future__ import annotations

from typing import Any

from pack.runner.demo import Picture as Drawn
from pack.runner.demo import example_prompt
from pack.runner.model_files import SAME_FOLDER, Models

Graph = dict[str, Any]
# The nodes that read the models. CLIPLoader reads no small text encoder, as a rehearsal has it.
OFFICIAL, OURS = "UNETLoader, CLIPLoader, VAELoader", "Load Z-Image-Turbo"
OFFICIAL_SMALL = "UNETLoader, VAELoader, Load Z-Image-Turbo for the text encoder"
SHIFT = 3.0
FIT, PROBE = "ZImageFitToVRAM", "ZImageVRAMProbe"
# What the nodes of these graphs are for; the seconds of the others are in the whole alone.
STAGES = {
    "load_s": ("UNETLoader", "CLIPLoader", "VAELoader", "ZImageTurboLoader"),
    "text_s": ("CLIPTextEncode", "ConditioningZeroOut"),
    "plan_s": (FIT,),
    "sampling_s": ("KSampler",),
    "decode_s": ("VAEDecode",),
    "save_s": ("SaveImage",),
}
# Stage -> the node id of its probe.
PROBES = {"text": "21", "sampling": "22", "decode": "23"}


def loader_of(models: Models, *, is_small: bool) -> str:
    """Which nodes can read these: the host's own wherever it has some, and it reads no folder."""
    is_folder = any(name.endswith("/") or name == SAME_FOLDER for name in models[:3])
    return OURS if is_folder else OFFICIAL_SMALL if is_small else OFFICIAL


def template(models: Models, drawn: Drawn, *, loader: str) -> Graph:
    """The official template of Z-Image-Turbo: cfg 1, res_multistep, simple.

    Args:
        models: the names of the files.
        drawn: size, steps, seed and text.
        loader: one of `loader_of`; OURS is the same graph behind the pack's loader node.
    """
    graph = example_prompt(models, drawn)
    if loader == OURS:
        return graph
    ours = graph.pop("1")
    graph |= {
        "11": _node("UNETLoader", unet_name=models.diffusion_model, weight_dtype="default"),
        "12": _node("CLIPLoader", clip_name=models.text_encoder, type="lumina2", device="default"),
        "13": _node("VAELoader", vae_name=models.vae),
        "14": _node("ModelSamplingAuraFlow", model=["11", 0], shift=SHIFT),
    }
    graph["2"]["inputs"]["clip"] = ["12", 0]
    graph["5"]["inputs"]["model"] = ["14", 0]
    graph["6"]["inputs"]["vae"] = ["13", 0]
    if loader == OFFICIAL_SMALL:
        graph["12"] = ours
        graph["2"]["inputs"]["clip"] = ["12", 1]
    return graph


def with_fit(graph: Graph, prefer: str) -> Graph:
    """With Fit to VRAM before prompt, sampler and decode, wired as in z_image_turbo_1gib.json.

    The budget is what is free.
    """
    text, sampler, decode = (graph[number]["inputs"] for number in ("2", "5", "6"))
    fit = _node(
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


def with_probes(graph: Graph) -> Graph:
    """With three VRAM Probes, wired as in z_image_turbo_probes.json."""
    sampler = graph["5"]["inputs"]
    text, sampling, decode = PROBES.values()
    return {
        **graph,
        text: _probe(["2", 0], "text encode", "steps"),
        sampling: _probe(sampler["model"], "sample", "blocks"),
        decode: _probe(["6", 0], "decode", "steps"),
        "3": _node("ConditioningZeroOut", conditioning=[text, 0]),
        "5": {
            **graph["5"],
            "inputs": {**sampler, "model": [sampling, 0], "positive": [text, 0]},
        },
        "7": {**graph["7"], "inputs": {**graph["7"]["inputs"], "images": [decode, 0]}},
    }


def probe_figures(history: dict[str, Any] | None) -> dict[str, Any]:
    """What the probes of a run say; all None where it had none.

    Raises:
        RuntimeError: a probe has not seen its stage to the end.
    """
    figures: dict[str, Any] = {f"probe_{stage}_bytes": None for stage in PROBES}
    figures |= {"probe_peak_bytes": None, "probe_measured_with": None}
    if history is None:
        return figures
    for stage, node in PROBES.items():
        record = history["outputs"][node]["z_image_vram_probe"][0]
        if record["state"] != "done":
            raise RuntimeError(f"the {stage} probe's record must be done, it is {record['state']}")
        figures[f"probe_{stage}_bytes"] = record["peak_bytes"]
        figures["probe_measured_with"] = record["measured_with"]
    peaks = [figures[f"probe_{stage}_bytes"] for stage in PROBES]
    figures["probe_peak_bytes"] = max((peak for peak in peaks if peak is not None), default=None)
    return figures


def plan_figures(history: dict[str, Any] | None) -> dict[str, Any]:
    """What Fit to VRAM planned for a run: its settings and largest peak; None where it had none."""
    for output in (history or {}).get("outputs", {}).values():
        for plan in output.get("z_image_fit", ()):
            settings = [f"{stage['name']}: {stage['setting']}" for stage in plan["stages"]]
            peak = max(stage["peak"] for stage in plan["stages"])
            return {"plan": "; ".join([plan["headline"], *settings]), "planned_bytes": peak}
    return {"plan": None, "planned_bytes": None}


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _probe(value: list[Any], label: str, detail: str) -> dict[str, Any]:
    mode = "measure and reset peak"
    return _node(PROBE, value=value, label=label, mode=mode, detail=detail, history="off")
