"""Takes the pictures of the README, the docs and the templates from the real page.

They are kept with the other artifacts; with ZIMAGE_PICTURES=1 they replace those of the project.
tests/test_pictures.py holds what is wanted of the project's.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.runner.live_host import REPO, LiveHost

pytest.importorskip("playwright", reason="needs Playwright")

from pack.testing.example_workflows import NAMES, model_files, nodes, read
from pack.tests.e2e.conftest import forget
from pack.tests.e2e.page import ComfyPage
from pack.tests.e2e.pictures import Camera, save_gif, save_png, save_thumbnail
from pack.tests.e2e.test_fit_page import Plan, set_widgets
from pack.tests.e2e.test_probe_page import EVENT, Probe
from PIL import Image, ImageDraw

pytestmark = [pytest.mark.browser, pytest.mark.once]

FITTED, PROBED = "z_image_turbo_8gib", "z_image_turbo_probes"
SIZE, SAMPLER, SAVE, FIT = 4, 5, 7, 9
PROBES = (10, 11, 12)
ON_MODEL = 11
SIDES_PX = (512, 1024, 2048, 4096)
SAMPLED_PX, SAMPLED_STEPS = 640, 8  # the longer it takes, the more frames
APART, PROBE_SIZE = [0, -2000], [420, 560]  # no other node beside it
RUN_SIDE_PX, RUN_STEPS = 256, 4
GRAPH_ZOOM = 0.8
FRAME_MS, LAST_MS = 250, 3000
SIZE_MS = 1500
# The small model's picture is noise.
HIDE_PREVIEW = f"[data-node-id='{SAVE}'] img {{ visibility: hidden }}"


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.environ.get("ZIMAGE_PICTURES"):
        return REPO
    kept = os.environ.get("ZIMAGE_ARTIFACTS")
    return Path(kept, "pictures") if kept else tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def named(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveHost]:
    """A server with a file of every name that a workflow asks for, each of them empty."""
    base_dir = tmp_path_factory.mktemp("named")
    (base_dir / "input").mkdir()
    for name in NAMES:
        workflow = read(name)
        for file in model_files(workflow):
            path = base_dir / "models" / file["directory"] / file["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for node in nodes(workflow):
            if node["type"] == "LoadImage":
                _landscape().save(base_dir / "input" / node["widgets_values"][0])
    with LiveHost(host_dir, base_dir) as live:
        yield live


def _landscape() -> Image.Image:
    """Stands in for the user's picture: a sun above hills."""
    picture = Image.new("RGB", (1024, 1024), (245, 206, 150))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((620, 180, 840, 400), fill=(255, 244, 214))
    for top, shade in ((520, (196, 140, 118)), (640, (128, 104, 112)), (780, (62, 66, 84))):
        hills = [(x, top + 90 * ((x // 128 * 37 + top) % 5 - 2) / 2) for x in range(0, 1153, 128)]
        draw.polygon([(0, 1024), *hills, (1024, 1024)], fill=shade)
    return picture


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    pages: list[ComfyPage] = []

    def open_one(host: LiveHost, *, scale: float) -> ComfyPage:
        pages.append(ComfyPage(browser, host, nodes_2=True, scale=scale))
        return pages[-1]

    yield open_one
    for page in pages:
        page.close()


def _graph(page: ComfyPage, workflow: dict[str, Any]) -> Image.Image:
    return Camera(page, [node["id"] for node in workflow["nodes"]], zoom=GRAPH_ZOOM).take()


def _keep_workflow(picture: Image.Image, album: Path, name: str) -> None:
    save_png(picture, album / "example_workflows" / f"{name}.png")
    save_thumbnail(picture, album / "example_workflows" / f"{name}.jpg")


def test_the_workflows_as_they_open(opened, named, album):
    page = opened(named, scale=1)
    for name in NAMES:
        if name == PROBED:
            continue  # its charts are empty before a run
        workflow = read(name)
        page.load(workflow)
        if any(node["type"] == "ZImageFitToVRAM" for node in workflow["nodes"]):
            Plan(page).wait_for("verdict", "Fits")
        _keep_workflow(_graph(page, workflow), album, name)
        assert page.page.get_by_test_id("error-overlay").count() == 0, name
    assert page.faults == []


def test_fit_to_vram(opened, named, album):
    page = opened(named, scale=2)
    page.load(read(FITTED))
    plan = Plan(page)
    camera = Camera(page, [FIT])
    frames = {}
    for side in SIDES_PX:
        set_widgets(page, SIZE, width=side, height=side)
        set_widgets(page, FIT, width=side, height=side)  # shown, though the latent's size counts
        plan.wait_for("asked", f"{side} \u00d7 {side}")
        page.settle()
        frames[side] = camera.take()
    save_png(frames[2048], album / "docs" / "pictures" / "fit_to_vram.png")
    path = album / "docs" / "pictures" / "fit_sizes.gif"
    save_gif(list(frames.values()), path, frame_ms=SIZE_MS, last_ms=LAST_MS)
    assert page.faults == []


def test_vram_probe_while_sampling_and_after_it(opened, server, album):
    forget(server)
    page = opened(server, scale=2)
    workflow = {**read(PROBED), "id": str(uuid.uuid4())}
    next(n for n in workflow["nodes"] if n["id"] == ON_MODEL).update(pos=APART, size=PROBE_SIZE)
    page.load(workflow)
    set_widgets(page, SIZE, width=SAMPLED_PX, height=SAMPLED_PX)
    set_widgets(page, SAMPLER, steps=SAMPLED_STEPS)
    probe = Probe(page, ON_MODEL)
    camera = Camera(page, [ON_MODEL])
    frames = [camera.take()]
    page.page.evaluate(
        """([kind, id, steps]) => app.api.addEventListener(kind, ({detail: {node_id, record}}) => {
            window.isDone ||= node_id === id && record.state === 'done'
                && record.steps.length === steps })""",
        [EVENT, str(ON_MODEL), SAMPLED_STEPS],
    )
    page.page.get_by_test_id("queue-button").click()
    page.page.mouse.move(5, 5)
    probe.wait_for_chart()
    while not page.page.evaluate("window.isDone"):
        frames.append(camera.take())
    server.post_json("/interrupt", {})  # the decode would take a minute
    page.settle()
    frames.append(camera.take())
    assert len(frames) > SAMPLED_STEPS
    pictures = album / "docs" / "pictures"
    save_gif(frames, pictures / "sampling.gif", frame_ms=FRAME_MS, last_ms=LAST_MS)
    save_png(frames[-1], pictures / "vram_probe.png")
    assert page.faults == []


def test_the_probes_workflow_after_a_run(opened, server, album):
    forget(server)
    page = opened(server, scale=1)
    workflow = {**read(PROBED), "id": str(uuid.uuid4())}
    page.load(workflow)
    set_widgets(page, SIZE, width=RUN_SIDE_PX, height=RUN_SIDE_PX)
    set_widgets(page, SAMPLER, steps=RUN_STEPS)
    page.run()
    for node_id in PROBES:
        Probe(page, node_id).wait_for_chart()
    page.page.add_style_tag(content=HIDE_PREVIEW)
    _keep_workflow(_graph(page, workflow), album, PROBED)
    assert page.faults == []
