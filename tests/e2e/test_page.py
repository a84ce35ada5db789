"""The example workflows in ComfyUI's own page, in a real browser, on a real server."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pack.runner.live_host import REPO
from PIL import Image, ImageStat

pytest.importorskip("playwright", reason="needs Playwright")

from pack.testing.example_workflows import NAMES, api_prompt, inputs_of, nodes
from pack.tests.e2e.conftest import forget

pytestmark = pytest.mark.browser

EXAMPLES = REPO / "example_workflows"
PLAIN, LOW_VRAM, PROBES = "z_image_turbo", "z_image_turbo_low_vram", "z_image_turbo_probes"
LARGE = "z_image_turbo_2048"
ONE_GIB, EIGHT_GIB = "z_image_turbo_1gib", "z_image_turbo_8gib"
NODE_TYPE = "ZImageTurboLoader"
# Ids of the workflows' nodes; PLAIN ends with SAVE, LEAN_VAE is in LARGE, FIT in the two GIB only.
LOADER, SAMPLER, SIZE, SAVE, CHECKPOINT, SLICE, LEAN_VAE = 1, 5, 4, 7, 9, 10, 11
FIT = 9
OURS = {
    LOADER: NODE_TYPE,
    CHECKPOINT: "ZImageGradientCheckpoint",
    SLICE: "ZImageAttentionSlice",
}
SIDE_PX, STEPS = 128, 2
MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae")
RENDERERS = pytest.mark.parametrize("nodes_2", [False, True], ids=["classic canvas", "nodes 2.0"])
ONCE = pytest.mark.once


def _example(name: str) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def workflow() -> dict[str, Any]:
    return _example(PLAIN)


@pytest.fixture
def low_vram() -> dict[str, Any]:
    """The workflow that has all of our nodes."""
    return _example(LOW_VRAM)


@pytest.fixture(scope="module")
def chinese() -> dict[str, Any]:
    path = REPO / "locales" / "zh" / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))


def _node(workflow: dict[str, Any], node_id: int) -> dict[str, Any]:
    return next(node for node in workflow["nodes"] if node["id"] == node_id)


def _smaller(workflow: dict[str, Any]) -> dict[str, Any]:
    smaller = copy.deepcopy(workflow)
    _node(smaller, SIZE)["widgets_values"][:2] = [SIDE_PX, SIDE_PX]
    _node(smaller, SAMPLER)["widgets_values"][2] = STEPS
    return smaller


@pytest.mark.parametrize(
    ("name", "nodes_2"),
    [
        pytest.param(PLAIN, False, id="classic canvas"),
        pytest.param(PLAIN, True, id="nodes 2.0"),
        pytest.param(LOW_VRAM, True, id="low vram"),
        pytest.param(PROBES, True, id="probes", marks=ONCE),
        pytest.param(LARGE, True, id="2048", marks=ONCE),
        pytest.param(ONE_GIB, True, id="1 gib"),
        pytest.param(EIGHT_GIB, True, id="8 gib", marks=ONCE),
    ],
)
def test_example_runs_to_a_picture(open_page, server, artifacts, name, nodes_2):
    # Else the second renderer finds every node's result in the cache and shows nothing new.
    forget(server)
    workflow = _example(name)
    page = open_page(nodes_2=nodes_2)
    page.load(_smaller(workflow))
    assert [node["type"] for node in workflow["nodes"] if not page.node(node["id"])["known"]] == []
    empty = page.spread(SAVE)

    prompt_id = page.run()
    page.wait_for_preview(SAVE, SIDE_PX)
    kept = f"{name}_{'nodes_2' if nodes_2 else 'classic'}"
    page.keep_screenshot(artifacts, kept)
    page.keep_graph(artifacts, f"{kept}_graph", workflow)

    picture = Image.open(io.BytesIO(server.images(server.wait(prompt_id, 60))[0]))
    assert (picture.format, picture.size) == ("PNG", (SIDE_PX, SIDE_PX))
    assert max(ImageStat.Stat(picture).stddev) > 10, "the picture is blank"
    assert page.spread(SAVE) > empty + 10, "the page does not show the picture"
    reports = {LOADER: ("Z-Image-Turbo", "shift 3")}
    if name == LARGE:
        reports[LEAN_VAE] = ("predicted at 2048x2048", "decode")
    if name in (LOW_VRAM, LARGE):
        reports |= {CHECKPOINT: ("predicted at 2048x2048", "activations"), SLICE: ("heads",)}
    if name in (ONE_GIB, EIGHT_GIB):
        budget = "1.00" if name == ONE_GIB else "8.00"
        words = (f"budget {budget} GiB: fits", f"{SIDE_PX}x{SIDE_PX}", "Apply Gradient Checkpoint")
        reports[FIT] = words
    for node_id, words in reports.items():
        report = page.node(node_id)["texts"][-1]
        assert [word for word in words if word not in report] == []
        assert "exact" not in report, "on a card it is up to rounding"
        assert page.page.get_by_text(words[0]).locator("visible=true").count() > 0
    assert page.page.locator(".p-dialog:visible").count() == 0
    assert page.page.get_by_test_id("error-overlay").count() == 0
    assert page.faults == []


@RENDERERS
def test_names_and_tooltips(open_page, server, low_vram, artifacts, nodes_2):
    page = open_page(nodes_2=nodes_2)
    page.load(low_vram)
    for node_id, node_type in OURS.items():
        schema = server.get_json(f"/object_info/{node_type}")[node_type]
        assert page.node(node_id)["title"] == schema["display_name"]
        if nodes_2:
            node = page.dom_node(node_id)
            assert schema["display_name"] in node.inner_text()
            if node.get_by_text("Show advanced inputs").count():
                node.get_by_text("Show advanced inputs").click()
        for name, (kind, options) in schema["input"]["required"].items():
            if kind != "MODEL":  # an input without a widget
                label = options.get("display_name") or name
                assert options["tooltip"] in page.tooltip(node_id, name, label)
    page.keep_screenshot(artifacts, f"advanced_{'nodes_2' if nodes_2 else 'classic'}")
    assert page.faults == []


@pytest.mark.parametrize(
    "nodes_2",
    [pytest.param(False, id="classic canvas"), pytest.param(True, id="nodes 2.0", marks=ONCE)],
)
def test_chinese_names_and_tooltips(open_page, low_vram, chinese, artifacts, nodes_2):
    page = open_page(nodes_2=nodes_2, locale="zh")
    page.load(low_vram)
    for node_id, node_type in OURS.items():
        node, texts = page.node(node_id), chinese[node_type]
        assert node["title"] == texts["display_name"]
        assert node["outputs"][0] == "模型"  # ComfyUI's own word for MODEL
        if nodes_2:
            assert texts["display_name"] in page.dom_node(node_id).inner_text()
        basic = set(node["labels"]) & set(texts["inputs"])
        basic -= {"weight_dtype", "shift", "head_groups"}  # advanced, hidden until asked for
        for name in sorted(basic):
            assert node["labels"][name] == texts["inputs"][name]["name"]
            told = page.tooltip(node_id, name, texts["inputs"][name]["name"])
            assert texts["inputs"][name]["tooltip"] in told
        assert len(basic) >= 2
    page.keep_screenshot(artifacts, f"chinese_{'nodes_2' if nodes_2 else 'classic'}")
    assert page.faults == []


@pytest.mark.parametrize(
    ("locale", "file"), [("en", "{}.md"), pytest.param("zh", "{}/zh.md", marks=ONCE)]
)
def test_help_pages(open_page, low_vram, artifacts, locale, file):
    page = open_page(nodes_2=False, locale=locale)
    page.load(low_vram)
    for node_id, node_type in OURS.items():
        path = REPO / "js" / "docs" / file.format(node_type)
        lines = path.read_text(encoding="utf-8").splitlines()
        headings = [line.lstrip("# ") for line in lines if line.startswith("#")]
        shown = page.open_help(node_id, headings[0])
        page.keep_screenshot(artifacts, f"help_{node_type}_{locale}")
        assert [heading for heading in headings if heading not in shown] == []
        assert len(headings) >= 4


def test_page_and_demo_send_the_same_prompt(open_page, workflow, low_vram):
    from pack.runner.graphs import Picture, example_prompt
    from pack.runner.model_files import Models
    from pack.tests.e2e.test_low_vram import CHECKPOINT as CHECKPOINT_INPUTS
    from pack.tests.e2e.test_low_vram import with_low_vram

    models = Models(*_node(workflow, LOADER)["widgets_values"][:3], Path())
    page = open_page(nodes_2=False)
    for graph in (workflow, low_vram):
        page.load(graph)
        sent = page.api_prompt()
        for node in sent.values():
            del node["_meta"]  # the node's title
        width, height, _ = _node(graph, SIZE)["widgets_values"]
        expected = example_prompt(models, Picture(width, height))
        if graph is low_vram:
            expected = with_low_vram(expected, {**CHECKPOINT_INPUTS, "prefer": "balance"})
            expected["7"]["inputs"]["filename_prefix"] = LOW_VRAM
        assert sent == expected


@pytest.mark.parametrize("nodes_2", [False, pytest.param(True, marks=ONCE)])
def test_examples_of_other_families_open_as_they_were_saved(open_page, server, nodes_2):
    """Their files are not there: tests/host/test_example_workflows.py runs them."""
    page = open_page(nodes_2=nodes_2, fresh=True)  # absent files leave their message on it
    schemas = server.get_json("/object_info")
    for name in NAMES:
        workflow = _example(name)
        if name.startswith("z_image") or {n["type"] for n in nodes(workflow)} - set(schemas):
            continue
        page.load(workflow)
        assert [n["type"] for n in workflow["nodes"] if not page.node(n["id"])["known"]] == []
        sent = page.api_prompt()
        for node in sent.values():
            del node["_meta"]  # the node's title
        assert sent == api_prompt(
            workflow, lambda kind: inputs_of(schemas[kind]["input"]), is_older=True
        )
    assert page.faults == []


def test_absent_files_are_listed_with_their_folders(open_page, workflow, artifacts):
    loader = _node(workflow, LOADER)
    names = [f"absent_{name}" for name in loader["widgets_values"][:3]]
    loader["widgets_values"][:3] = names
    for model, name in zip(loader["properties"]["models"], names, strict=True):
        model["name"] = name
    page = open_page(nodes_2=False, fresh=True)
    page.load(workflow)
    # Newer hosts: a message whose button opens a panel; older ones: a dialog.
    listing = page.page.locator(".p-dialog, [data-testid='properties-panel']")
    listing = listing.filter(has_text=names[0]).locator("visible=true")
    button = page.page.get_by_test_id("error-overlay-see-errors")
    button.or_(listing).first.wait_for()
    if button.is_visible():
        button.click()
    listing.first.wait_for()
    page.keep_screenshot(artifacts, "absent_files")
    text = listing.first.inner_text()
    assert [word for word in (*names, *MODEL_FOLDERS) if word not in text] == []


def test_templates_offer_the_examples(open_page, server, artifacts):
    names = server.get_json("/workflow_templates")["z-image-low-vram"]
    assert sorted(names) == list(NAMES)
    page = open_page(nodes_2=False, fresh=True)
    page.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.get_by_text("Z-Image Low VRAM").first.click()
    for name in names:
        with Image.open(EXAMPLES / f"{name}.jpg") as picture:
            width = picture.width
        card = page.page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()  # pictures out of sight are not loaded
        card.locator("img").first.wait_for()
        page.page.wait_for_function(
            "([id, width]) => [...document.querySelectorAll(`[data-testid=${id}] img`)]"
            ".some(image => image.naturalWidth === width)",
            arg=[f"template-workflow-{name}", width],
        )
    page.keep_screenshot(artifacts, "templates")
    page.page.get_by_test_id(f"template-workflow-{LOW_VRAM}").click()
    page.page.wait_for_function(f"app.graph.getNodeById({SLICE})?.type === '{OURS[SLICE]}'")
