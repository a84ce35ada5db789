"""The example workflows as files, and as the prompts that a page makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
NOTES = ("MarkdownNote", "Note")  # the page's own, which a prompt has not
_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
_SEEDS = ("seed", "noise_seed")

# An input's type, or a list of options, and its settings, in a schema's order.
Inputs = Mapping[str, tuple[Any, Mapping[str, Any]]]


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def nodes(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that run."""
    return (node for node in workflow["nodes"] if node["type"] not in NOTES)


def model_files(workflow: dict[str, Any]) -> Iterator[dict[str, str]]:
    """The published files that its loaders name: name, directory, url, perhaps a hash."""
    return (file for node in nodes(workflow) for file in node["properties"].get("models", ()))


def inputs_of(schema: Mapping[str, Mapping[str, Any]]) -> Inputs:
    """What a node takes, of the host's INPUT_TYPES or of the `input` of its /object_info."""
    both = {**schema.get("required", {}), **schema.get("optional", {})}
    return {name: (kind, more[0] if more else {}) for name, (kind, *more) in both.items()}


def widgets(inputs: Inputs) -> Iterator[str | None]:
    """The inputs that have a widget, by the page's order; None is a widget of the page's own."""
    for name, (kind, options) in inputs.items():
        if options.get("forceInput") or not (isinstance(kind, list) or kind in _WIDGETS):
            continue
        yield name
        is_seed = kind == "INT" and name in _SEEDS
        if is_seed or options.get("control_after_generate") or options.get("image_upload"):
            yield None


def api_prompt(
    workflow: dict[str, Any], inputs: Callable[[str], Inputs], *, is_older: bool = False
) -> dict[str, Any]:
    """The workflow in the API format: each widget's value by its place in the host's schema.

    Args:
        inputs: what a node of this type takes on the host.
        is_older: the host is older than the one that the workflow was saved with, and may lack a
            node's last widgets.

    Raises:
        ValueError: a node has more or fewer values than the host has widgets.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in nodes(workflow):
        taken = list(widgets(inputs(node["type"])))
        values = node["widgets_values"]
        if len(values) < len(taken) or (len(values) > len(taken) and not is_older):
            raise ValueError(f"{node['type']} has widgets {taken}, got {values}")
        given = {name: value for name, value in zip(taken, values, strict=False) if name}
        slots = {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot["link"]}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": {**given, **slots}}
    return prompt
