"""VRAM Probe in ComfyUI's own page: live during a real run, and there again after a reload."""

from __future__ import annotations

import json
import re
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from pack.runner.live_host import REPO

pytest.importorskip("playwright", reason="needs Playwright")

from pack.tests.e2e.page import ComfyPage

pytestmark = pytest.mark.browser

NODE_TYPE = "ZImageVRAMProbe"
LOADER, SIZE, SAMPLER, DECODE, SAVE = 1, 4, 5, 6, 7
ON_MODEL, ON_IMAGE = 20, 21
SIDE_PX, STEPS = 128, 3
SETTINGS = ["measure and reset peak", "blocks", "off"]
PARTS = ("weights", "activations", "other")
EVENT = "z_image_low_vram.probe"
ROUTE = "/z_image_low_vram/probes/"
MiB, GiB = 2**20, 2**30
COPY_TIMEOUT_MS = 20_000


def _node(workflow: dict[str, Any], node_id: int) -> dict[str, Any]:
    return next(node for node in workflow["nodes"] if node["id"] == node_id)


def _probe(node_id: int, label: str, pos: list[int]) -> dict[str, Any]:
    return {
        "id": node_id,
        "type": NODE_TYPE,
        "pos": pos,
        "size": [400, 520],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [{"name": "value", "type": "*", "link": None}],
        "outputs": [{"name": "value", "type": "*", "links": []}],
        "properties": {},
        "widgets_values": [label, *SETTINGS],
    }


def _put_between(workflow: dict[str, Any], link_id: int, probe: dict[str, Any]) -> None:
    """Places the probe on a link of the workflow."""
    link = next(link for link in workflow["links"] if link[0] == link_id)
    new_id = max(link[0] for link in workflow["links"]) + 1
    _, _, _, target, slot, kind = link
    workflow["links"].append([new_id, probe["id"], 0, target, slot, kind])
    next(i for i in _node(workflow, target)["inputs"] if i.get("link") == link_id)["link"] = new_id
    link[3:5] = probe["id"], 0
    probe["inputs"][0]["link"] = link_id
    probe["outputs"][0]["links"] = [new_id]
    workflow["nodes"].append(probe)
    workflow["last_node_id"], workflow["last_link_id"] = probe["id"], new_id


@pytest.fixture
def probed() -> dict[str, Any]:
    """The example with a probe on the model and one on the picture, small and without notes."""
    workflow = json.loads((REPO / "example_workflows/z_image_turbo.json").read_text("utf-8"))
    workflow["id"] = str(uuid.uuid4())  # the history knows nothing of it yet
    workflow["groups"] = []
    workflow["nodes"] = [n for n in workflow["nodes"] if n["type"] != "MarkdownNote"]
    _node(workflow, SIZE)["widgets_values"][:2] = [SIDE_PX, SIDE_PX]
    _node(workflow, SAMPLER)["widgets_values"][2] = STEPS
    links = {(link[1], link[3]): link[0] for link in workflow["links"]}
    _put_between(workflow, links[LOADER, SAMPLER], _probe(ON_MODEL, "sample", [20, 800]))
    _put_between(workflow, links[DECODE, SAVE], _probe(ON_IMAGE, "decode", [460, 800]))
    return workflow


class Probe:
    """A probe's chart on the open page."""

    def __init__(self, page: ComfyPage, node_id: int | str):
        self.page = page.page
        self.node_id = node_id
        path = ".subgraph.getNodeById".join(f"('{part}')" for part in str(node_id).split(":"))
        self.node = f"app.rootGraph.getNodeById{path}"
        self.page.wait_for_function(f"{self.node}?.widgets?.some(w => w.name === 'vram_chart')")
        widget = f"{self.node}.widgets.find(w => w.name === 'vram_chart')"
        self.page.evaluate(f"{widget}.element.dataset.probe = '{node_id}'")
        self.element = self.page.locator(f"[data-probe='{node_id}']")

    def part(self, name: str):
        return self.element.locator(f".{name}")

    def text(self, name: str) -> str:
        return self.part(name).inner_text()

    def wait_for_chart(self) -> None:
        self.part("legend").locator("b").first.wait_for()

    def wait_for_step(self, step: int) -> int:
        """Returns the last step in the strip below the chart, when it is at least this one."""
        last = "[...root.querySelectorAll('svg .cell')].length"
        root = f"document.querySelector('[data-probe=\"{self.node_id}\"]').shadowRoot"
        counted = f"() => {{ const root = {root}; const n = {last}; return n >= {step} && n }}"
        return self.page.wait_for_function(counted).json_value()

    def hover(self, share: float) -> None:
        """Rests the mouse over the chart, at that share of its width."""
        box = self.part("pointer").bounding_box()
        self.page.mouse.move(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        self.part("where.pointed").wait_for()

    def copied(self, click) -> str:
        """What is in the clipboard after the click."""
        self.page.evaluate("navigator.clipboard.writeText('')")
        click()
        # Not wait_for_function: to it a promise is an answer, so it reads once.
        text, labels = self.part("copy").evaluate(
            """async (button, limitMs) => {
                const end = performance.now() + limitMs;
                const labels = new Set();
                let text = "";
                while (!text && performance.now() < end) {
                    text = await navigator.clipboard.readText();
                    labels.add(button.textContent);
                    await new Promise(done => setTimeout(done, 20));
                }
                return [text, [...labels]];
            }""",
            COPY_TIMEOUT_MS,
        )
        assert text, f"the clipboard stayed empty, and the copy button said {labels}"
        return text


def _shown(count: int) -> str:
    return f"{count / GiB:.2f} GiB" if count >= GiB else f"{count / MiB:.3g}"


def _listen(page: ComfyPage) -> None:
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.page.evaluate(
        """event => { window.heard = []; app.api.addEventListener(event, ({detail}) =>
            window.heard.push({at: performance.now(), ...structuredClone(detail)})) }""",
        EVENT,
    )


def _record(server, prompt_id: str, node_id: int | str) -> dict[str, Any]:
    outputs = server.wait(prompt_id, 60)["outputs"]
    return outputs[str(node_id)]["z_image_vram_probe"][0]


def _into_subgraph(page: ComfyPage, node_id: int) -> str:
    """Moves a node into a subgraph; returns its id in a prompt."""
    return page.page.evaluate(
        """id => { const node = app.graph.getNodeById(id);
            const made = app.graph.convertToSubgraph(new Set([node])).node;
            return `${made.id}:${made.subgraph.nodes[0].id}` }""",
        node_id,
    )


def _open_graph_of(page: ComfyPage, node_id: int | str) -> None:
    """Shows the subgraph that holds the node; nothing for a node of the workflow itself."""
    outer, *inner = str(node_id).split(":")
    if inner:
        page.page.evaluate(
            """id => { const node = app.rootGraph.getNodeById(id);
                app.canvas.openSubgraph(node.subgraph, node) }""",
            outer,
        )


@pytest.mark.parametrize(
    "nodes_2",
    [
        pytest.param(False, id="classic canvas", marks=pytest.mark.once),
        pytest.param(True, id="nodes 2.0"),
    ],
)
def test_a_run_is_drawn_live_and_again_after_a_reload(
    open_page, server, probed, artifacts, nodes_2
):
    _node(probed, SAMPLER)["widgets_values"][0] = int(nodes_2)  # a seed, else nothing is sampled
    name = f"probe_{'nodes_2' if nodes_2 else 'classic'}"
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(probed)
    on_image = str(ON_IMAGE)
    if nodes_2:  # an id like "22:21"
        on_image = _into_subgraph(page, ON_IMAGE)
        probed = page.page.evaluate("app.rootGraph.serialize()")
    _listen(page)
    probe = Probe(page, ON_MODEL)
    assert "appears here while the workflow runs" in probe.text("empty")
    page.keep_screenshot(artifacts, f"{name}_empty")

    start = time.monotonic()
    prompt_id = page.run()
    probe.wait_for_chart()
    record = _record(server, prompt_id, ON_MODEL)
    assert record["state"] == "done"
    assert [step["step"] for step in record["steps"]] == list(range(1, STEPS + 1))
    heard = page.page.evaluate("window.heard")
    _check_events(heard, prompt_id, time.monotonic() - start)

    for part in PARTS:
        assert probe.element.locator(f"polygon.{part}").count() == 1
        assert _shown(record["parts_at_peak"][part]) in probe.text("legend")
    assert probe.element.locator("svg .step").count() == STEPS
    assert _shown(record["peak_bytes"]) in probe.text("headline")
    assert "peak" in probe.element.locator("svg .label").last.text_content()
    assert probe.part("state").is_hidden()
    probe.hover(0.5)
    assert re.search(rf"· \d.* s · step [1-{STEPS}]", probe.text("where"))
    page.keep_screenshot(artifacts, f"{name}_done")

    assert probe.copied(probe.part("copy").click) == record["report"]
    with page.page.expect_download() as download:
        probe.part("save").click()
    assert json.loads(Path(download.value.path()).read_text("utf-8")) == record
    assert probe.copied(lambda: _choose_in_menu(probe)) == record["issue_report"]
    probe.part("figures").click()
    absent = [figure for figure in record["figures"] if figure["bytes"] is None]
    told = f"not available: {absent[0]['reason']}"
    probe.part("details").get_by_text(told).first.wait_for()
    page.keep_screenshot(artifacts, f"{name}_figures")
    assert page.faults == []

    page.run()  # nothing has changed, so everything comes from the cache
    probe.part("state.earlier").wait_for()
    assert probe.text("state") == "from an earlier run"
    assert _shown(record["peak_bytes"]) in probe.text("headline")

    page.load({**probed, "id": str(uuid.uuid4())})
    assert "appears here" in Probe(page, ON_MODEL).text("empty"), "another workflow's figures"
    if nodes_2:
        page.reload()
    else:  # another tab has nothing but the host's history
        page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(probed)
    for node_id in (ON_MODEL, on_image):
        _open_graph_of(page, node_id)
        again = Probe(page, node_id)
        again.wait_for_chart()
        assert _shown(_record(server, prompt_id, node_id)["peak_bytes"]) in again.text("headline")
    assert page.faults == []


def _check_events(heard: list[dict[str, Any]], prompt_id: str, seconds: float) -> None:
    sampled = [event for event in heard if event["node_id"] == str(ON_MODEL)]
    assert {event["prompt_id"] for event in heard} == {prompt_id}
    states = [event["record"]["state"] for event in sampled]
    assert states[1] == "running"
    assert states[-1] == "done"
    # Eight a second, the first of them at once, and that of the node itself. How many arrive in any
    # one second depends on the machine.
    assert len(states) <= 8 * seconds + 2


def _choose_in_menu(probe: Probe) -> None:
    probe.part("pointer").click(button="right")
    probe.page.get_by_text("Copy VRAM report for an issue").locator("visible=true").last.click()


def _send(page: ComfyPage, node_id: str, record: dict[str, Any], prompt: str = "made up") -> None:
    page.page.evaluate(
        """([kind, node_id, record, prompt_id]) => app.api.dispatchEvent(new CustomEvent(
            kind, {detail: {prompt_id, node_id, record}}))""",
        [EVENT, node_id, record, prompt],
    )


def _card_record(**changed: Any) -> dict[str, Any]:
    """A record as a card with 24 GB would give it; the figures are made up."""
    weights, other = int(11.46 * GiB), 320 * MiB
    rows = [[0.0, 0, 0, other, None, None], [2.0, weights, 0, other, None, None]]
    for step in (1, 2):
        for block in range(4):
            activations = (300 + 40 * block) * MiB
            at_s = 2.0 + step - 1 + block / 4
            rows.append([at_s, weights, activations, other, step, f"layers.{block}"])
    peak = weights + 420 * MiB + other
    return {
        "version": 1,
        "label": "made up",
        "state": "running",
        "mode": "measure",
        "detail": "blocks",
        "device": {
            "name": "A card",
            "type": "cuda",
            "total_bytes": 24 * GiB,
            "allocator": "native",
        },
        "measured_with": "torch allocator",
        "peak_bytes": peak,
        "peak_at": {"t_s": 2.75, "step": 1, "block": "layers.3", "operation": None},
        "parts_at_peak": {"weights": weights, "activations": 420 * MiB, "other": other},
        "timeline": rows,
        "steps": [{"step": 1, "start_s": 2.0, "seconds": 1.0, "peak_bytes": peak}],
        "figures": [{"name": "pinned RAM", "bytes": None, "reason": "not asked"}],
        "largest": [],
        "report": "a report",
        "issue_report": "an issue's report",
        "summary": [],
        "notes": [],
        "files": [],
        **changed,
    }


@pytest.mark.once
def test_subgraphs_and_states_in_chinese_and_a_light_theme(open_page, server, probed, artifacts):
    server.post_json("/settings/Comfy.ColorPalette", "light")
    try:
        page = open_page(nodes_2=True, locale="zh", fresh=True)
        page.load(probed)
        inner = _into_subgraph(page, ON_IMAGE)
        outer, inside = Probe(page, ON_MODEL), Probe(page, inner)
        assert "这里会显示" in outer.text("empty")

        _send(page, str(ON_MODEL), _card_record())
        outer.wait_for_chart()
        assert outer.text("verdict") == "目前峰值 12.18 GiB"
        assert "共 24 GiB" in outer.text("rest") and "11.82 GiB" in outer.text("rest")
        assert outer.text("state") == "测量中"
        # Hardly anything changes, so the axis is cut; to scale, a card of twice the peak is out.
        assert outer.part("cut").count() == 1
        outer.part("close-up").click()
        outer.part("cut").wait_for(state="detached")
        assert outer.part("ceiling").count() == 0
        assert "↑ 显卡 24.00 GiB" in outer.part("plot").text_content()
        small = {**_card_record()["device"], "total_bytes": 16 * GiB}
        seen = _card_record(state="interrupted", device=small, is_at_least=True)
        _send(page, str(ON_MODEL), seen)
        outer.part("ceiling").wait_for(state="attached")  # a line has no height
        assert outer.text("verdict") == "到那时的峰值 至少 12.18 GiB"
        assert outer.text("state") == "已中断"
        page.keep_screenshot(artifacts, "probe_chinese_light")

        _send(page, inner, _card_record(state="done", label="inside"))
        _open_graph_of(page, inner)
        inside.wait_for_chart()
        page.keep_screenshot(artifacts, "probe_subgraph")
        assert inside.part("state").is_hidden()
        _send(page, inner, {**_card_record(), "version": 2})
        inside.part("empty").wait_for()
        assert "另一个版本" in inside.text("empty")
        assert page.faults == []
    finally:
        server.post_json("/settings/Comfy.ColorPalette", "dark")


@pytest.mark.once
def test_the_chart_keeps_its_width_beside_the_properties_panel(open_page, server, probed):
    """The page listed it there and gave it that panel's width, so a click could miss its button."""
    panel = "/settings/Comfy.RightSidePanel.IsOpen"
    server.post_json(panel, True)
    try:
        page = open_page(nodes_2=False, fresh=True)
        page.load(probed)
        _listen(page)
        probe = Probe(page, ON_MODEL)
        _send(page, str(ON_MODEL), _card_record(state="done"))
        probe.wait_for_chart()
        wide = probe.element.evaluate("element => element.clientWidth")
        assert probe.copied(probe.part("copy").click) == "a report"
        page.page.get_by_placeholder("Search").first.wait_for()  # of the node's parameters
        page.settle()
        assert probe.element.evaluate("element => element.clientWidth") == wide
        assert page.page.get_by_text("vram_chart").count() == 0
        assert page.faults == []
    finally:
        server.post_json(panel, False)


def _has_asked_what_runs(answered: list[str]) -> bool:
    """Whether a page that has just opened a workflow knows that none of its probes runs."""
    paths = [url.split("/api/")[-1] for url in answered]
    history = "history?max_items=10"  # asked before, and by this pack alone
    return history in paths and "queue" in paths[paths.index(history) :]


def test_a_tab_opened_and_one_reloaded_in_mid_run_show_the_run(
    open_page, server, probed, artifacts
):
    _node(probed, SAMPLER)["widgets_values"][2] = 5000
    first = open_page(nodes_2=False, fresh=True)
    asked: list[str] = []
    first.page.on("request", lambda request: asked.append(request.url))
    answered: list[str] = []
    first.page.on("response", lambda response: answered.append(response.url))
    first.load(probed)
    while not _has_asked_what_runs(answered):  # until the test's own limit
        first.page.wait_for_timeout(50)
    first.page.get_by_test_id("queue-button").click()
    try:
        Probe(first, ON_MODEL).wait_for_step(1)
        assert not [url for url in asked if ROUTE in url], "it hears the run, and need not ask"
        other = open_page(nodes_2=False, fresh=True)
        other.page.on("request", lambda request: asked.append(request.url))
        other.page.wait_for_timeout(700)
        assert not [url for url in asked if ROUTE in url], "no probe is open there"
        other.load(probed)
        probe = Probe(other, ON_MODEL)
        probe.wait_for_step(probe.wait_for_step(1) + 10)
        assert probe.text("state") == "measuring"
        assert Probe(other, ON_IMAGE).part("head").is_hidden(), "not its turn yet"
        other.keep_screenshot(artifacts, "probe_other_tab")
        asked.clear()
        first.reload()
        first.load(probed)
        again = Probe(first, ON_MODEL)
        again.wait_for_step(1)
        assert [url for url in asked if ROUTE in url], "for what it missed while it was away"
        again.wait_for_step(again.wait_for_step(1) + 10)
    finally:
        server.post_json("/interrupt", {})
    for shown in (probe, again):
        shown.part("state.interrupted").wait_for()
    asked.clear()
    first.page.wait_for_timeout(1200)
    assert not [url for url in asked if ROUTE in url], "nothing runs any more"
    assert first.faults + other.faults == []


@pytest.mark.once
def test_a_tab_reloaded_in_mid_run_goes_on_and_a_removed_node_listens_no_more(open_page, probed):
    page = open_page(nodes_2=False, fresh=True)
    page.load(probed)
    _send(page, str(ON_MODEL), _card_record())
    Probe(page, ON_MODEL).wait_for_chart()
    page.reload()
    page.load(probed)
    probe = Probe(page, ON_MODEL)
    # Nothing runs any more, so what was kept is shown as a record without an end.
    probe.page.wait_for_function(
        "document.querySelector('[data-probe]').shadowRoot"
        ".querySelector('.state').textContent === 'end not seen'"
    )
    _send(page, str(ON_MODEL), _card_record(state="done"))
    probe.part("state").wait_for(state="hidden")
    pressed = page.page.evaluate(
        f"""() => {{ const node = {probe.node};
            const root = node.widgets.find(w => w.name === 'vram_chart').element.shadowRoot;
            const button = root.querySelector('.figures');
            button.click(); node.graph.remove(node); button.click();
            return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(
                () => done(button.getAttribute('aria-pressed'))))) }}"""
    )
    assert pressed == "true", "the second click came after the node was removed"
    _send(page, str(ON_MODEL), _card_record())
    page.load(probed)
    page.page.route("**/queue", lambda route: route.abort())  # the host is away
    _send(page, str(ON_IMAGE), _card_record(), prompt="another")
    Probe(page, ON_IMAGE).wait_for_chart()
    page.page.unroute("**/queue")
    with page.page.expect_response("**/queue"):  # what it could not say before
        _send(page, str(ON_IMAGE), _card_record(), prompt="another")
    assert page.faults == []
