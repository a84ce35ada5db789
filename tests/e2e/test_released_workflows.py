"""Workflows that a release put into users' hands: this version opens and runs each of them.

released/<version>/ holds the example workflows of that release, which are never edited again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat

pytest.importorskip("playwright", reason="needs Playwright")

pytestmark = pytest.mark.browser

RELEASED = sorted((Path(__file__).parent / "released").glob("*/*.json"))
MOST_NODES = "z_image_turbo_2048"  # of ours; the oldest host runs this one alone
SIDE_PX, STEPS = 128, 2


@pytest.fixture(scope="module")
def page(browser, server) -> Iterator[Any]:
    """One page for all workflows: only it turns a saved graph into a prompt."""
    from pack.tests.e2e.page import ComfyPage

    opened = ComfyPage(browser, server, nodes_2=True)
    yield opened
    opened.close()


def _saved_values(workflow: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the file says of each widget of ours, by node and by name."""
    found = {}
    for node in workflow["nodes"]:
        if node["type"].startswith("ZImage"):
            names = [given["widget"]["name"] for given in node["inputs"] if "widget" in given]
            found[str(node["id"])] = dict(zip(names, node["widgets_values"], strict=True))
    assert found
    return found


def test_the_workflows_of_the_first_release_are_there():
    names = [path.stem for path in RELEASED if path.parent.name == "0.1.0"]
    kinds = ("", "_2048", "_8gib", "_low_vram", "_probes")
    assert names == [f"z_image_turbo{kind}" for kind in kinds]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=f"{path.parent.name}/{path.stem}",
            marks=[] if path.stem == MOST_NODES else [pytest.mark.once],
        )
        for path in RELEASED
    ],
)
def test_a_released_workflow_runs_to_a_picture(page, server, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    page.load(workflow)
    prompt = page.api_prompt()
    # A widget that moved or changed its name would get another one's value.
    for node_id, values in _saved_values(workflow).items():
        given = prompt[node_id]["inputs"]
        assert {name: given.get(name) for name in values} == values, prompt[node_id]["class_type"]
    runs = [node for node in workflow["nodes"] if node["type"] != "MarkdownNote"]
    assert {node_id: node["class_type"] for node_id, node in prompt.items()} == {
        str(node["id"]): node["type"] for node in runs
    }

    for node in prompt.values():
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"].update(width=SIDE_PX, height=SIDE_PX)
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = STEPS
    entry = server.wait(server.queue(prompt), 300)
    picture = Image.open(io.BytesIO(server.images(entry)[0]))
    assert picture.size == (SIDE_PX, SIDE_PX)
    assert max(ImageStat.Stat(picture).stddev) > 10, "the picture is blank"
    assert page.faults == []
