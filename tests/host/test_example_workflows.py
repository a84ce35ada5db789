"""Every example workflow on the host: as the host validates it; and run to its end when small.

Those of Z-Image are run by tests/e2e/test_page.py, with files. Here the loaders give small models.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing import example_models, probe_prompts
from pack.testing.example_models import EXAMPLES, Example
from pack.testing.example_workflows import NAMES, api_prompt, inputs_of, nodes, read
from pack.testing.probe_prompts import Bench, bench
from PIL import Image

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

CHECKPOINT, LEAN_VAE = "ZImageGradientCheckpoint", "ZImageLeanVAE"
SINK = "ExampleTestSink"
MATCHING = "COMFY_MATCHTYPE_V3"
UPLOAD = "upload"  # the page's own button


class Sink:
    """A node that keeps what the workflow made."""

    kept: dict[str, torch.Tensor] = {}  # noqa: RUF012 (the host makes the instance)
    RETURN_TYPES = ()
    FUNCTION = "keep"
    CATEGORY = "tests"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 (the host's name)
        return {"required": {"value": ("*", {}), "name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802 (the host's name)
        """Runs also where its value comes from the host's cache."""
        return float("nan")

    def keep(self, value: Any, name: str) -> dict[str, Any]:
        self.kept[name] = value["samples"] if isinstance(value, dict) else value
        return {}


@pytest.fixture(scope="module")
def prompts(host: Any) -> Iterator[Bench]:
    """The host's executor, with all of its nodes and ours."""
    with bench(host) as made:
        assert asyncio.run(host.nodes.init_builtin_extra_nodes()) == []
        host.nodes.NODE_CLASS_MAPPINGS[SINK] = Sink
        yield made


@pytest.fixture
def empty_files(host: Any) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Puts empty files with the names that a workflow asks for into the host's folders."""
    made: list[Path] = []

    def make(path: Path) -> None:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            made.append(path)

    def put(workflow: dict[str, Any]) -> None:
        for node in nodes(workflow):
            for file in node["properties"].get("models", ()):
                make(host.models_dir / file["directory"] / file["name"])
            if node["type"] == "LoadImage":
                make(Path(host.folder_paths.get_input_directory()) / node["widgets_values"][0])
        host.folder_paths.filename_list_cache.clear()

    yield put
    for path in made:
        path.unlink()


@pytest.fixture
def input_files(host: Any, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Puts noise with the names that a prompt asks for into an input folder."""
    before = host.folder_paths.get_input_directory()
    drawn = torch.Generator().manual_seed(0)
    host.folder_paths.set_input_directory(str(tmp_path))

    def put(prompt: dict[str, Any]) -> None:
        for node in prompt.values():
            if node["class_type"] == "LoadImage":
                size = (192, 256, 3)
                pixels = torch.randint(256, size, dtype=torch.uint8, generator=drawn).numpy()
                Image.fromarray(pixels).save(tmp_path / node["inputs"]["image"])

    yield put
    host.folder_paths.set_input_directory(before)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def is_older(host: Any, node: dict[str, Any]) -> bool:
    """Whether the host is older than the one that the node was saved with."""
    properties = node["properties"]
    saved = properties["ver"] if properties["cnr_id"] == "comfy-core" else "0"
    return number(host.version) < number(saved)


def schema(host: Any, node_type: str) -> Any:
    return inputs_of(host.nodes.NODE_CLASS_MAPPINGS[node_type].INPUT_TYPES())


def prompt_of(host: Any, workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow in the API format; skips where the host is older and lacks one of its nodes."""
    for node in nodes(workflow):
        if node["type"] not in host.nodes.NODE_CLASS_MAPPINGS and is_older(host, node):
            pytest.skip(f"ComfyUI {host.version} has no {node['type']}")
    older = any(is_older(host, node) for node in nodes(workflow))
    return api_prompt(workflow, lambda kind: schema(host, kind), is_older=older)


@pytest.mark.parametrize("name", NAMES)
def test_the_host_takes_it(host: Any, prompts: Bench, empty_files: Any, name: str) -> None:
    import execution

    workflow = read(name)
    empty_files(workflow)
    prompt = prompt_of(host, workflow)
    is_valid, error, outputs, faults = asyncio.run(
        execution.validate_prompt("an example", prompt, None)
    )
    assert is_valid and error is None and faults == {}, (error, faults)
    assert outputs
    taken = {node_id for node in prompt.values() for node_id, _ in links_of(node)}
    ends = {i for i, node in prompt.items() if is_output(host, node["class_type"])}
    assert set(prompt) == taken | ends, "every node serves the result"


def links_of(node: dict[str, Any]) -> list[list[Any]]:
    return [value for value in node["inputs"].values() if isinstance(value, list)]


def is_output(host: Any, node_type: str) -> bool:
    return getattr(host.nodes.NODE_CLASS_MAPPINGS[node_type], "OUTPUT_NODE", False)


@pytest.mark.parametrize("name", NAMES)
def test_links_and_slots_are_those_of_the_schema(host: Any, prompts: Bench, name: str) -> None:
    workflow = read(name)
    prompt_of(host, workflow)
    by_id = {node["id"]: node for node in workflow["nodes"]}
    assert len(by_id) == len(workflow["nodes"]) and workflow["last_node_id"] == max(by_id)
    for node in nodes(workflow):
        taken = schema(host, node["type"])
        named = [slot["name"] for slot in node["inputs"]]
        assert set(named) - {UPLOAD} <= set(taken) or is_older(host, node), node["type"]
        given = host.nodes.NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES
        # A workflow of an older version of ours may lack a node's last outputs.
        for slot, kind in zip(node["outputs"], given, strict=False):
            assert kind in (slot["type"], MATCHING), node["type"]
    for link, source, out, target, slot, kind in workflow["links"]:
        made, taken = by_id[source]["outputs"][out], by_id[target]["inputs"][slot]
        assert made["type"] == kind and link in made["links"]
        assert taken["type"] in (kind, MATCHING, "*") and link == taken["link"]
        declared, _ = schema(host, by_id[target]["type"])[taken["name"]]
        assert declared in (kind, MATCHING)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps_and_pictures_have_its_name(name: str) -> None:
    from pack.testing.example_workflows import FOLDER

    workflow = read(name)
    boxes = [(*node["pos"], *node["size"]) for node in workflow["nodes"]]
    title = 30
    for i, (x, y, width, height) in enumerate(boxes):
        for other_x, other_y, other_width, other_height in boxes[i + 1 :]:
            is_beside = x + width <= other_x or other_x + other_width <= x
            assert is_beside or y + height <= other_y - title or other_y + other_height <= y - title
    with Image.open(FOLDER / f"{name}.png") as picture, Image.open(FOLDER / f"{name}.jpg") as small:
        assert picture.width > small.width == 512


MARKS = {
    "qwen_image_edit_low_vram": (pytest.mark.once, pytest.mark.slow),
    **{f"{name}_low_vram": pytest.mark.once for name in ("sdxl", "flux_1_dev", "flux_2_dev")},
}


def test_each_family_runs_below() -> None:
    assert set(EXAMPLES) == {name for name in NAMES if not name.startswith("z_image")}


def without(prompt: dict[str, Any], *kinds: str) -> dict[str, Any]:
    """The prompt with what these nodes are given instead of what they give."""
    through = {i: next(iter(links_of(n))) for i, n in prompt.items() if n["class_type"] in kinds}

    def source(value: Any) -> Any:
        while isinstance(value, list) and value[0] in through:
            value = through[value[0]]
        return value

    return {
        i: {**node, "inputs": {name: source(value) for name, value in node["inputs"].items()}}
        for i, node in prompt.items()
        if i not in through
    }


def with_small_models(host: Any, prompt: dict[str, Any], example: Example) -> dict[str, Any]:
    """The prompt at a small size, with small models instead of its loaders', and with sinks."""
    given = example_models.models(example.family)
    probe_prompts.shelf(MODEL=given.model, CLIP=given.clip, VAE=given.vae)
    made = {kind: probe_prompts.source(kind) for kind in ("MODEL", "CLIP", "VAE")}
    types = {i: node["class_type"] for i, node in prompt.items()}
    loaders = {i: kind for i, kind in types.items() if "Loader" in kind}

    def source(value: Any) -> Any:
        if isinstance(value, list) and value[0] in loaders:
            return [host.nodes.NODE_CLASS_MAPPINGS[loaders[value[0]]].RETURN_TYPES[value[1]], 0]
        return value

    for i, node in prompt.items():
        if i not in loaders:
            inputs = {name: source(value) for name, value in node["inputs"].items()}
            inputs |= example.small.get(node["class_type"], {}) | example.small.get(i, {})
            inputs = {name: value for name, value in inputs.items() if value is not None}
            made[i] = {**node, "inputs": inputs}
    for i, kind in types.items():
        if kind in ("KSampler", "KSamplerAdvanced", "SamplerCustomAdvanced", "VAEDecode"):
            made[f"sink {i}"] = {
                "class_type": SINK, "inputs": {"value": [i, 0], "name": f"{kind} {i}"},
            }  # fmt: skip
    return made


def made_by(host: Any, prompts: Bench, prompt: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What its samplers and decoders give when all of it has run."""
    Sink.kept.clear()
    ends = [i for i, node in prompt.items() if is_output(host, node["class_type"])]
    prompts.executor.execute(copy.deepcopy(prompt), "an example", {}, ends)  # it writes into it
    assert prompts.error is None, prompts.error
    return dict(Sink.kept)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in EXAMPLES]
)
def test_a_family_runs_to_its_end_with_the_hosts_result(
    host: Any, prompts: Bench, output: Path, input_files: Any, caplog: Any, name: str
) -> None:
    prompt = without(prompt_of(host, read(name)), "FluxKontextImageScale")  # to a megapixel
    small = with_small_models(host, prompt, EXAMPLES[name])
    input_files(prompt)
    with caplog.at_level(logging.INFO):
        ours = made_by(host, prompts, small)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("Apply Gradient Checkpoint: ")]
    assert [line for line in said if line.startswith("Lean VAE: ")]
    assert not [line for line in said if "ComfyUI's own code runs there" in line]
    assert [path for path in output.rglob("*") if path.is_file()], "the workflow saves a file"

    stock_blocks = made_by(host, prompts, without(small, CHECKPOINT))
    stock = made_by(host, prompts, without(small, CHECKPOINT, LEAN_VAE))
    assert set(ours) == set(stock) and len(ours) >= 2
    for kind, wanted in stock.items():
        assert wanted.isfinite().all() and wanted.std() > 0.05
        # Lean VAE differs by rounding, also in a reference that it encodes.
        assert torch.equal(ours[kind], stock_blocks[kind]), kind
        assert (ours[kind] - wanted).norm() < 1e-5 * wanted.norm(), kind
