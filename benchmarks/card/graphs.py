"""The graphs of whole runs, from text to picture, in the host's API format.

Each is the demo's example with other nodes in some places.
"""

from __future__ import annotations

from typing import Any

from pack.runner.graphs import FIT, PROBES, Graph, example_prompt, node, probe_record
from pack.runner.graphs import Picture as Drawn
from pack.runner.model_files import SAME_FOLDER, Models

# The nodes that read the models. CLIPLoader reads no small text encoder, as a rehearsal has it.
OFFICIAL, OURS = "UNETLoader, CLIPLoader, VAELoader", "Load Z-Image-Turbo"
OFFICIAL_SMALL = "UNETLoader, VAELoader, Load Z-Image-Turbo for the text encoder"
SHIFT = 3.0
# What the nodes of these graphs are for; the seconds of the others are in the whole alone.
STAGES = {
    "load_s": ("UNETLoader", "CLIPLoader", "VAELoader", "ZImageTurboLoader"),
    "text_s": ("CLIPTextEncode", "ConditioningZeroOut"),
    "plan_s": (FIT,),
    "sampling_s": ("KSampler",),
    "decode_s": ("VAEDecode",),
    "save_s": ("SaveImage",),
}


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
        "11": node("UNETLoader", unet_name=models.diffusion_model, weight_dtype="default"),
        "12": node("CLIPLoader", clip_name=models.text_encoder, type="lumina2", device="default"),
        "13": node("VAELoader", vae_name=models.vae),
        "14": node("ModelSamplingAuraFlow", model=["11", 0], shift=SHIFT),
    }
    graph["2"]["inputs"]["clip"] = ["12", 0]
    graph["5"]["inputs"]["model"] = ["14", 0]
    graph["6"]["inputs"]["vae"] = ["13", 0]
    if loader == OFFICIAL_SMALL:
        graph["12"] = ours
        graph["2"]["inputs"]["clip"] = ["12", 1]
    return graph


def probe_figures(history: dict[str, Any] | None) -> dict[str, Any]:
    """What the probes of a run say; all None where it had none.

    Raises:
        RuntimeError: a probe has not seen its stage to the end.
    """
    figures: dict[str, Any] = {f"probe_{stage}_bytes": None for stage in PROBES}
    figures |= {"probe_peak_bytes": None, "probe_measured_with": None}
    if history is None:
        return figures
    for stage in PROBES:
        record = probe_record(history, stage)
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
