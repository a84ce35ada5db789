"""Both panels among other nodes: subgraphs, modes, keys after a click, undo, a new record."""

from __future__ import annotations

import re
import uuid

import pytest

pytest.importorskip("playwright", reason="needs Playwright")

from pack.tests.e2e.page import ComfyPage
from pack.tests.e2e.test_fit_page import FIT, SIZE, Plan
from pack.tests.e2e.test_fit_page import workflow as workflow
from pack.tests.e2e.test_panel_access import both_renderers
from pack.tests.e2e.test_probe_page import ON_MODEL, Probe, _card_record, _send
from pack.tests.e2e.test_probe_page import probed as probed
from playwright.sync_api import expect

pytestmark = pytest.mark.browser
BYPASSED, MUTED, RUNS = 4, 2, 0
REMOVED = 3


def _exists(page: ComfyPage, node_id: int) -> bool:
    return page.page.evaluate("id => Boolean(app.graph.getNodeById(id))", node_id)


@both_renderers
def test_in_a_subgraph_it_plans_for_the_size_from_outside(open_page, workflow, nodes_2):
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(workflow)
    Plan(page).wait_for("verdict", "Fits in 8 GiB")
    inner = page.page.evaluate(
        """id => { const node = app.graph.getNodeById(id);
            const made = app.graph.convertToSubgraph(new Set([node]));
            app.canvas.openSubgraph(made.subgraph, made.node);
            return `${made.node.id}:${made.subgraph.nodes[0].id}` }""",
        FIT,
    )
    plan = Plan(page, inner)
    plan.wait_for("asked", "2048 \u00d7 2048")
    page.page.evaluate(
        f"""id => {{ for (const {{widgets}} of [app.rootGraph.getNodeById(id), {plan.node}])
            for (const widget of widgets) widget.value =
                {{width: 8192, height: 8192, budget_gib: 2}}[widget.name] ?? widget.value }}""",
        SIZE,
    )
    plan.wait_for("verdict", "Does not fit in 2 GiB")
    smaller = plan.element.get_by_role("button").first.text_content() or ""
    plan.element.get_by_role("button").first.click()
    plan.wait_for("verdict", "Fits in 2 GiB.")
    sides = page.page.evaluate(
        "id => app.rootGraph.getNodeById(id).widgets.slice(0, 2).map(w => String(w.value))", SIZE
    )
    assert sides == smaller.split(" \u00d7 ")
    assert page.faults == []


@both_renderers
def test_a_value_that_a_muted_node_would_give_is_not_planned_for(open_page, workflow, nodes_2):
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(workflow)
    plan = Plan(page)
    plan.wait_for("asked", "2048 \u00d7 2048")
    page.page.evaluate(
        """id => { const size = app.graph.getNodeById(id);
            window.source = LiteGraph.createNode("PrimitiveInt");
            source.pos = [-400, -300];
            app.graph.add(source);
            source.widgets[0].value = 4096;
            source.connect(0, size, size.inputs.findIndex(input => input.name === "width")) }""",
        SIZE,
    )
    plan.wait_for("asked", "4096 \u00d7 2048")
    for mode, width in ((BYPASSED, 2048), (RUNS, 4096), (MUTED, 2048)):
        page.page.evaluate("mode => { source.mode = mode }", mode)
        plan.wait_for("asked", f"{width} \u00d7 2048")
        sent = page.api_prompt()[str(SIZE)]["inputs"].get("width", width)  # 0.16.3 drops the input
        assert isinstance(sent, list) if mode == RUNS else sent == width
    assert page.faults == []


@both_renderers
def test_the_delete_key_after_a_click_is_the_page_s(open_page, workflow, probed, nodes_2):
    page = open_page(nodes_2=nodes_2, fresh=True)
    select = "id => { app.canvas.deselectAll(); app.canvas.selectNode(app.graph.getNodeById(id)) }"
    page.load(workflow)
    plan = Plan(page)
    plan.wait_for("verdict", "Fits")
    page.page.evaluate(select, FIT)
    plan.element.locator(".stage .name").first.click()
    assert plan.element.evaluate("host => host.shadowRoot.activeElement") is None
    page.page.keyboard.press("Delete")
    assert not _exists(page, FIT)

    page.load(probed)
    _send(page, str(ON_MODEL), _card_record())
    probe = Probe(page, ON_MODEL)
    probe.wait_for_chart()
    page.page.evaluate(select, ON_MODEL)
    probe.part("pointer").click()
    page.page.keyboard.press("Delete")
    assert not _exists(page, ON_MODEL)
    assert page.faults == []


@pytest.mark.once
def test_the_panel_of_a_node_that_was_replaced_twice_is_shown(open_page, workflow):
    """Undo loads the graph again; Nodes 2.0 kept the panel of the first node on the screen."""
    page = open_page(nodes_2=True, fresh=True)
    page.load(workflow)
    Plan(page).wait_for("verdict", "Fits")
    for _ in range(3):
        page.page.evaluate(
            """async () => { const graph = app.rootGraph.serialize();
                await app.loadGraphData(graph);
                await app.loadGraphData(graph) }"""
        )
        plan = Plan(page)
        plan.wait_for("verdict", "Fits")
        assert page.page.evaluate(
            """id => [...document.querySelectorAll(`[data-node-id="${id}"] *`)]
                .filter(element => element.shadowRoot).map(element => element.dataset.plan)""",
            FIT,
        ) == [str(FIT)]
        plan.element.evaluate("host => delete host.dataset.plan")
    assert page.faults == []


@pytest.mark.once
def test_removed_panels_are_freed(open_page, workflow):
    page = open_page(nodes_2=False, fresh=True)
    page.page.evaluate("window.removed = []")
    for number in range(REMOVED):
        node = next(node for node in workflow["nodes"] if node["type"] == "ZImageFitToVRAM")
        alone = {**node, "id": 100 + number, "inputs": [], "outputs": []}
        page.load({**workflow, "id": str(uuid.uuid4()), "nodes": [alone], "links": []})
        page.page.evaluate(
            """id => removed.push(new WeakRef(app.graph.getNodeById(id).widgets
                .find(widget => widget.name === "vram_plan").element))""",
            100 + number,
        )
    page.load({**workflow, "id": str(uuid.uuid4()), "nodes": [], "links": []})
    session = page.page.context.new_cdp_session(page.page)
    left = REMOVED
    for _ in range(20):
        session.send("HeapProfiler.collectGarbage")
        left = page.page.evaluate("removed.filter(weak => weak.deref()).length")
        if left <= 1:
            break
    assert left <= 1, "the page itself keeps the last one"
    assert page.faults == []


@both_renderers
def test_a_shorter_record_and_an_equal_end_of_a_run(open_page, probed, nodes_2):
    """The keyboard's moment stays in the record, and a screen reader hears of each run and copy."""
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.load(probed)
    record = _card_record()
    _send(page, str(ON_MODEL), record)
    probe = Probe(page, ON_MODEL)
    probe.wait_for_chart()
    probe.part("pointer").focus()
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("Shift+Tab")  # by the keyboard
    page.page.keyboard.press("End")
    last = str(len(record["timeline"]) - 1)
    expect(probe.part("pointer")).to_have_attribute("aria-valuenow", last)
    _send(page, str(ON_MODEL), {**record, "timeline": record["timeline"][:2], "steps": []})
    expect(probe.part("pointer")).to_have_attribute("aria-valuenow", "1")
    expect(probe.element.locator(".cursor")).to_have_attribute("x1", re.compile(r"^\d"))

    probe.element.evaluate(
        """host => { const spoken = host.shadowRoot.querySelector(".spoken");
            window.heard = [];
            new MutationObserver(() => heard.push(spoken.textContent))
                .observe(spoken, {childList: true, characterData: true, subtree: true}) }"""
    )
    heard = "window.heard.filter(Boolean).map(words => words.split(' ')[0])"
    for ends in (["Peak"], ["Peak", "Peak"]):
        _send(page, str(ON_MODEL), _card_record())
        _send(page, str(ON_MODEL), _card_record(state="done"))
        page.page.wait_for_function(f"{heard}.length === {len(ends)}")
        assert page.page.evaluate(heard) == ends
    for copies in (["Copied"], ["Copied", "Copied"]):
        probe.part("copy").click()
        page.page.wait_for_function(f"{heard}.length === {2 + len(copies)}")
        assert page.page.evaluate(heard)[2:] == copies
        expect(probe.part("copy")).not_to_have_text("Copied")
    assert page.faults == []
