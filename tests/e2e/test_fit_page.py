"""Fit to VRAM in ComfyUI's own page: its plan before a run, of a run, and after a reload."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from pack.runner.live_host import REPO

pytest.importorskip("playwright", reason="needs Playwright")

from pack.tests.e2e.conftest import forget
from pack.tests.e2e.page import ComfyPage
from playwright.sync_api import Route

pytestmark = pytest.mark.browser

SIZE, SAMPLER, FIT = 4, 5, 9
SIDE_PX, STEPS = 256, 3
ROUTE = "/z_image_low_vram/fit"
QUESTION = {
    "width": 2048, "height": 2048, "batch_size": 1, "budget_gib": 8, "prefer": "balance",
    "has_vae": True, "has_clip": True,
}  # fmt: skip
GIB = 2**30


@pytest.fixture
def workflow() -> dict[str, Any]:
    """The example, under an id of which the history knows nothing yet."""
    path = REPO / "example_workflows" / "z_image_turbo_8gib.json"
    return {**json.loads(path.read_text("utf-8")), "id": str(uuid.uuid4())}


class Plan:
    """The panel of a Fit to VRAM node on the open page."""

    def __init__(self, page: ComfyPage, node_id: int | str = FIT):
        self.page = page.page
        path = ".subgraph.getNodeById".join(f"('{part}')" for part in str(node_id).split(":"))
        self.node = f"app.rootGraph.getNodeById{path}"
        self.page.wait_for_function(f"{self.node}?.widgets?.some(w => w.name === 'vram_plan')")
        widget = f"{self.node}.widgets.find(w => w.name === 'vram_plan')"
        self.page.evaluate(f"{widget}.element.dataset.plan = '{node_id}'")
        self.element = self.page.locator(f"[data-plan='{node_id}']")

    def wait_for(self, part: str, words: str) -> None:
        """Returns when that part of the panel says so."""
        self.element.locator(f".{part}").filter(has_text=words).first.wait_for()

    def text(self, part: str) -> str:
        return self.element.locator(f".{part}").first.text_content() or ""

    def peaks(self) -> list[str]:
        return self.element.locator(".stage .peak").all_text_contents()


def set_widgets(page: ComfyPage, node_id: int, **values: Any) -> None:
    """Changes widgets as a script would: no event tells of it."""
    page.page.evaluate(
        """([id, values]) => { const node = app.graph.getNodeById(id);
            for (const [name, value] of Object.entries(values))
                node.widgets.find(w => w.name === name).value = value }""",
        [node_id, values],
    )


def keep(page: ComfyPage, folder: Path, name: str) -> None:
    """A picture with the node as large as the screen allows."""
    page.page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", FIT)
    fit_view(page)
    page.keep_screenshot(folder, name)


def fit_view(page: ComfyPage) -> None:
    """Moves the view to what is selected, else to all nodes."""
    page.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.settle()


def hold(page: ComfyPage, url: str) -> list[Route]:
    """Requests to there wait until they are released."""
    held: list[Route] = []
    page.page.route(url, lambda route: held.append(route))
    return held


def release(page: ComfyPage, held: list[Route]) -> None:
    """Lets them through once one has come."""
    while not held:  # until the test's own limit
        page.page.wait_for_timeout(50)
    for route in held:
        route.continue_()


def _shown(plan: dict[str, Any]) -> list[str]:
    """The peaks as the page writes them."""
    texts = []
    for stage in plan["stages"]:
        size = stage["peak"]
        in_mib = f"{size / 2**20:.0f} MiB" if size >= 100 * 2**20 else f"{size / 2**20:.1f} MiB"
        texts.append(f"{size / GIB:.2f} GiB" if size >= GIB else in_mib)
    return texts


@pytest.mark.parametrize(
    "nodes_2",
    [
        pytest.param(False, id="classic canvas"),
        pytest.param(True, id="nodes 2.0", marks=pytest.mark.once),
    ],
)
def test_before_a_run_after_it_and_after_a_reload(open_page, server, workflow, artifacts, nodes_2):
    # Else the second renderer finds the node's result in the cache, and nothing is given out.
    forget(server)
    name = f"fit_{'nodes_2' if nodes_2 else 'classic'}"
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(workflow)
    plan = Plan(page)
    plan.wait_for("verdict", "Fits")
    predicted = server.post_json(ROUTE, QUESTION)
    assert plan.peaks() == _shown(predicted)
    assert "2048 \u00d7 2048, batch 1" in plan.text("asked")
    assert plan.text("verdict") == "Fits in 8 GiB."
    streamed = next(s["streamed"] for s in predicted["stages"] if s["name"] == "denoise")
    told = f"{streamed / GIB:.1f} GiB of weights are streamed per step, about "
    assert plan.text("streamed").startswith(f"{told}{predicted['copy_seconds']:.1f} s")
    keep(page, artifacts, f"{name}_before")

    set_widgets(page, FIT, budget_gib=2)
    set_widgets(page, SIZE, width=8192, height=8192)
    plan.wait_for("verdict", "Does not fit")
    refusal = server.post_json(ROUTE, {**QUESTION, "budget_gib": 2, "width": 8192, "height": 8192})
    size = refusal["others"][0]
    assert size["differs_in"] == "size"
    missing = f"{refusal['missing_bytes'] / GIB:.2f} GiB"
    assert plan.text("verdict") == f"Does not fit in 2 GiB: {missing} short."
    assert plan.text("offers").startswith(f"Would fit:{size['width']} \u00d7 {size['height']}")
    assert plan.element.locator(".stage.over").count() == 2  # sampling and decoding
    keep(page, artifacts, f"{name}_refusal")

    set_widgets(page, FIT, budget_gib=8)
    set_widgets(page, SIZE, width=SIDE_PX, height=SIDE_PX)
    set_widgets(page, SAMPLER, steps=STEPS)
    prompt_id = page.run()
    plan.wait_for("foot", "Planned in the last run")
    (planned,) = server.wait(prompt_id, 60)["outputs"][str(FIT)]["z_image_fit"]
    assert plan.peaks() == _shown(planned)
    small = {**QUESTION, "width": SIDE_PX, "height": SIDE_PX}
    assert plan.peaks() != _shown(server.post_json(ROUTE, small)), "another model's weights"
    keep(page, artifacts, f"{name}_after")
    set_widgets(page, SIZE, width=2048, height=2048)
    plan.wait_for("foot", "Predicted for the published")
    page.page.evaluate("app.canvas.deselectAll()")
    fit_view(page)
    page.keep_graph(artifacts, f"{name}_graph", workflow)  # the example's picture
    set_widgets(page, SIZE, width=SIDE_PX, height=SIDE_PX)
    plan.wait_for("foot", "Planned in the last run")

    ran = page.page.evaluate("app.rootGraph.serialize()")
    page.reload()
    # The history comes after the plan was asked for, and the answer after the history.
    histories, answers = hold(page, "**/history?*"), hold(page, f"**{ROUTE}")
    page.load(ran)
    plan = Plan(page)
    release(page, histories)
    plan.wait_for("foot", "Planned in the last run")
    with page.page.expect_response(f"**{ROUTE}"):
        release(page, answers)
    page.settle()
    assert "Planned in the last run" in plan.text("foot")
    assert plan.peaks() == _shown(planned)
    assert page.faults == []


@pytest.mark.once
def test_what_is_told_in_place_of_a_plan(open_page, server, workflow, artifacts):
    """In Chinese and a light theme; and a node that is removed asks no more."""
    server.post_json("/settings/Comfy.ColorPalette", "light")
    try:
        page = open_page(nodes_2=True, locale="zh", fresh=True)
        page.load(workflow)
        plan = Plan(page)
        plan.wait_for("verdict", "放得下")
        keep(page, artifacts, "fit_chinese_light")
        lines = (REPO / "js/docs/ZImageFitToVRAM/zh.md").read_text("utf-8").splitlines()
        headings = [line.lstrip("# ") for line in lines if line.startswith("#")]
        assert page.node(FIT)["title"] == headings[0]
        shown = page.open_help(FIT, headings[0])
        page.keep_screenshot(artifacts, "fit_help")
        assert [heading for heading in headings if heading not in shown] == []
        set_widgets(page, SIZE, batch_size=64)
        plan.wait_for("offer", "批次 ")
        page.page.evaluate(f"app.graph.getNodeById({SIZE}).mode = 4")  # bypassed
        plan.wait_for("empty", "图片尺寸要到运行时才知道")
        page.page.evaluate(f"app.graph.getNodeById({FIT}).disconnectInput(2)")
        plan.wait_for("asked", "2048 \u00d7 2048")
        set_widgets(page, FIT, prefer="nonsense")
        plan.wait_for("error", "prefer 只能是")
        keep(page, artifacts, "fit_refused")

        page.page.route(f"**{ROUTE}", lambda route: route.fulfill(status=404))
        set_widgets(page, FIT, prefer="speed")
        plan.wait_for("error", "服务器不认识这个请求")
        inner = page.page.evaluate(
            """id => { const node = app.graph.getNodeById(id);
                const made = app.graph.convertToSubgraph(new Set([node]));
                return `${made.node.id}:${made.subgraph.nodes[0].id}` }""",
            FIT,
        )
        page.page.unroute(f"**{ROUTE}")
        page.page.evaluate(
            """id => { const node = app.rootGraph.getNodeById(id);
                app.canvas.openSubgraph(node.subgraph, node) }""",
            inner.split(":")[0],
        )
        plan = Plan(page, inner)
        page.page.evaluate(f"{plan.node}.widgets.find(w => w.name === 'prefer').value = 'smallest'")
        plan.wait_for("setting", "精简 VAE\uff1asmallest")
        removed = "const prefer = node.widgets.find(w => w.name === 'prefer');"
        removed += "node.graph.remove(node); prefer.value = 'speed'"
        asked: list[str] = []
        page.page.on("request", lambda request: asked.append(request.post_data or ""))
        added = "window.other = LiteGraph.createNode(node.type); app.rootGraph.add(other)"
        for change in (
            f"{{ const node = {plan.node}; {removed}; {added} }}",
            "other.widgets.find(w => w.name === 'prefer').value = 'smallest'",
        ):
            with page.page.expect_request(f"**{ROUTE}"):  # of the other node
                page.page.evaluate(change)
        assert [body for body in asked if '"speed"' in body] == []
        assert page.faults == []
    finally:
        server.post_json("/settings/Comfy.ColorPalette", "dark")
