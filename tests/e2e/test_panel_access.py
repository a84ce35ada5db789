"""Both panels by keyboard and screen reader, and with no text cut, at each size and theme."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs Playwright")

from pack.tests.e2e.page import ComfyPage
from pack.tests.e2e.test_fit_page import FIT, SIZE, Plan, set_widgets, workflow
from pack.tests.e2e.test_probe_page import ON_MODEL, GiB, Probe, _card_record, _send, probed
from playwright.sync_api import Locator, expect

__all__ = ["probed", "workflow"]  # fixtures
pytestmark = pytest.mark.browser

both_renderers = pytest.mark.parametrize(
    "nodes_2",
    [
        pytest.param(False, id="classic canvas"),
        pytest.param(True, id="nodes 2.0", marks=pytest.mark.once),
    ],
)
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text of this size
LEAST_OF_A_LINE = 3.0  # and for a part of a chart
NO_LIMIT = {"en": "No limit", "zh": "\u6ca1\u6709\u4e0a\u9650"}

# Texts of the panel, and lines for ComfyUI alone, whose colour is too near to that of their ground.
PALE = """(host, leasts) => {
    const pen = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const painted = colours => {
        pen.clearRect(0, 0, 1, 1);
        for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1) }
        return [...pen.getImageData(0, 0, 1, 1).data];
    };
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(c => c / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const seen = [];
    for (const element of host.shadowRoot.querySelectorAll("*")) {
        const own = [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());
        const isLine = element.matches(".stock");
        if (!own && !isLine) continue;
        if (!element.getClientRects().length || element.matches(":disabled")) continue;
        if (["STYLE", "title", "desc"].includes(element.tagName)) continue;
        const grounds = [];
        for (let at = isLine ? element.parentElement : element; at; at = at.parentElement) {
            grounds.unshift(getComputedStyle(at).backgroundColor);
        }
        const style = getComputedStyle(element);
        const colour = isLine ? style.backgroundColor
            : element.tagName === "text" ? style.fill : style.color;
        const [text, ground] = [painted([...grounds, colour]), painted(grounds)].map(light);
        const ratio = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
        const least = isLine ? leasts.line : leasts.text;
        if (ratio < least) seen.push([element.textContent.trim().slice(0, 40), ratio]);
    }
    return seen }"""

# Texts that stick out of the panel's width or of a box that clips them, and texts that touch.
CUT = """host => {
    const root = host.shadowRoot, panel = root.querySelector(".panel");
    const inside = panel.getBoundingClientRect(), found = [], boxes = [];
    const scale = inside.width / panel.offsetWidth;
    // What scrolling shows is not cut.
    const visible = ({left, right, top, bottom}, element) => {
        for (let at = element; at && at !== panel; at = at.parentElement) {
            if (getComputedStyle(at).overflowY === "visible") continue;
            const clip = at.getBoundingClientRect();
            [top, bottom] = [Math.max(top, clip.top), Math.min(bottom, clip.bottom)];
        }
        return {left, right, top, bottom};
    };
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) {
        const parent = node.parentElement;
        if (!node.data.trim() || parent.closest(".spoken, style, title, desc")) continue;
        const range = document.createRange();
        range.selectNodeContents(node);
        const words = node.data.trim().slice(0, 40);
        for (const whole of range.getClientRects()) {
            const box = visible(whole, parent);
            if (box.right - box.left < 1 || box.bottom - box.top < 1) continue;
            if (box.left < inside.left - 1 || box.right > inside.right + 1) found.push([words]);
            boxes.push([words, box, parent]);
        }
        const clips = getComputedStyle(parent).overflowX !== "visible";
        if (clips && parent.scrollWidth > parent.clientWidth + 1) found.push([words, "clipped"]);
    }
    boxes.forEach(([words, a, parent], i) => boxes.slice(i + 1).forEach(([others, b, other]) => {
        const apart = 2 * scale; // of the lines' own leading
        const [x, y] = [Math.min(a.right, b.right) - Math.max(a.left, b.left),
            Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top)];
        if (x > apart && y > apart && !parent.contains(other) && !other.contains(parent)) {
            found.push([words, others]);
        }
    }));
    const scrolls = panel.scrollHeight > panel.clientHeight + 1;
    if (scrolls && getComputedStyle(panel).overflowY !== "auto") found.push(["cut off below"]);
    return found }"""


def _shown(page: ComfyPage, node_id: int, **widgets: Any) -> None:
    """Sets widgets as one step of the page's undo, as a user does."""
    page.page.evaluate("app.canvas.emitBeforeChange()")
    set_widgets(page, node_id, **widgets)
    page.page.evaluate("app.canvas.emitAfterChange()")


def _values(page: ComfyPage, node_id: int) -> dict[str, Any]:
    return page.page.evaluate(
        "id => Object.fromEntries(app.graph.getNodeById(id).widgets.map(w => [w.name, w.value]))",
        node_id,
    )


def _reached(page: ComfyPage, press: Callable[[], None]) -> list[str]:
    """The keys that the page hears while something is pressed."""
    page.page.evaluate(
        """() => { window.reached = []; window.stopped?.abort();
            window.stopped = new AbortController();
            window.addEventListener("keydown", event => window.reached.push(event.key),
                {signal: window.stopped.signal}) }"""
    )
    press()
    return page.page.evaluate("window.reached")


@both_renderers
def test_a_button_sets_what_would_fit_and_undo_takes_it_back(open_page, workflow, nodes_2):
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(workflow)
    _shown(page, FIT, budget_gib=2)
    _shown(page, SIZE, width=8192, height=4096)
    plan = Plan(page)
    plan.wait_for("verdict", "Does not fit in 2 GiB")
    before = _values(page, SIZE)
    choices = plan.element.get_by_role("group", name="Would fit:").get_by_role("button")
    smaller, larger = choices.all_text_contents()
    assert re.fullmatch(r"\d+ \u00d7 \d+", smaller) and larger.startswith("budget ")

    plan.element.get_by_role("button", name=smaller).click()
    plan.wait_for("verdict", "Fits in 2 GiB.")
    width, height = (int(side) for side in smaller.split(" \u00d7 "))
    assert _values(page, SIZE) == {**before, "width": width, "height": height}
    assert plan.element.evaluate("host => host.shadowRoot.activeElement.className") == "headline"
    page.page.keyboard.press("Control+z")
    page.page.wait_for_function(  # it loads the graph again, with other nodes
        """([id, width]) => app.graph.getNodeById(id)?.widgets
            .some(w => w.name === "width" && w.value === width)""",
        arg=[SIZE, before["width"]],
    )
    page.settle()
    plan = Plan(page)
    plan.wait_for("verdict", "Does not fit in 2 GiB")
    assert _values(page, SIZE) == before

    budget = plan.element.get_by_role("button", name=larger)
    budget.focus()
    page.page.keyboard.press("Enter")
    gib = larger.removeprefix("budget ")
    plan.wait_for("verdict", f"Fits in {gib}.")
    assert _values(page, FIT)["budget_gib"] == float(gib.removesuffix(" GiB"))
    assert page.faults == []


@both_renderers
def test_the_keyboard_reaches_each_figure_and_no_shortcut_of_the_page(
    open_page, workflow, probed, nodes_2
):
    page = open_page(nodes_2=nodes_2, fresh=True)
    page.load(workflow)
    plan = Plan(page)
    plan.wait_for("verdict", "Fits")
    page.page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", FIT)
    keys, region = page.page.keyboard, plan.element.get_by_role("region", name="VRAM plan")
    stages = region.get_by_role("list", name="Memory by stage").get_by_role("listitem")
    figures = r"peak \d.* weights on the card \d.*, activations \d.*, workspace \d"
    for name in ("Text encode", "Denoise", "VAE decode"):
        expect(stages.filter(has_text=name)).to_have_accessible_name(
            re.compile(f"^{name}: {figures}")
        )
    expect(region.get_by_role("status")).to_have_text(re.compile("Fits in 8 GiB. .* per step"))
    stages.first.focus()
    for press, at in (("Tab", 1), ("ArrowDown", 2), ("Shift+Tab", 1), ("Home", 0), ("End", 2)):
        keys.press(press)
        expect(stages.nth(at)).to_be_focused()
        expect(plan.element.locator(".legend .of")).to_have_text(
            stages.nth(at).locator(".name").inner_text()
        )
    ring = stages.nth(2).evaluate("stage => getComputedStyle(stage).outlineStyle")
    assert ring == "solid"

    def press_all() -> None:
        for key in ("Delete", "Backspace", "Space", "r", ".", "ArrowUp", "Escape", "Control+l"):
            keys.press(key)

    offset = page.page.evaluate("[...app.canvas.ds.offset]")
    assert _reached(page, press_all) == ["Escape", "Control", "l"]
    assert page.page.evaluate("[...app.canvas.ds.offset]") == offset
    assert page.page.evaluate("id => Boolean(app.graph.getNodeById(id))", FIT)

    page.load(probed)
    _send(page, str(ON_MODEL), _card_record())
    probe = Probe(page, ON_MODEL)
    probe.wait_for_chart()
    region = probe.element.get_by_role("region", name="Memory measured by this probe")
    said = region.get_by_role("status")
    expect(said).to_have_text("")  # not each event of a run
    _send(page, str(ON_MODEL), _card_record(state="done"))
    expect(said).to_have_text(re.compile(r"^Peak 12.18 GiB of 24 GiB: 11.82 GiB left"))
    expect(region.get_by_role("img", name="Memory over time")).to_have_accessible_description(
        re.compile(r"peak 12.18 GiB \(weights 11.46 GiB, activations 420 MiB, other 320 MiB\)")
    )
    moments = region.get_by_role("slider", name="Memory over time")
    moments.focus()
    told = []
    for key, place in (("Home", 0), ("ArrowRight", 1), ("End", 9), ("ArrowLeft", 8)):
        keys.press(key)
        expect(moments).to_have_attribute("aria-valuenow", str(place))
        told.append(moments.get_attribute("aria-valuetext"))
        expect(probe.part("where")).to_have_text(told[-1].split(" (")[0])
    assert told[0] == "320 MiB · 0.00 s (weights 0 B, activations 0 B, other 320 MiB)"
    assert told[3].startswith("12.14 GiB · 3.50 s · step 2 · layers.2 (weights 11.46 GiB")
    keys.press("Tab")
    expect(region.get_by_role("button", name="Figures")).to_be_focused()
    assert _reached(page, lambda: keys.press("Space")) == []
    details = region.get_by_role("group", name="Figures")
    expect(details).to_contain_text("At the peakpeak12.18 GiBweights11.46 GiB")
    keys.press("Shift+Tab")
    expect(details).to_be_focused()
    assert page.faults == []


def _check(element: Locator, what: str, theme: str) -> None:
    leasts = {"text": LEAST_CONTRAST, "line": LEAST_OF_A_LINE}
    assert element.evaluate(PALE, leasts) == [], f"{what}, {theme}: contrast"
    assert element.evaluate(CUT) == [], f"{what}, {theme}: cut or overlapping"


@both_renderers
@pytest.mark.parametrize("locale", ["en", "zh"])
def test_no_text_is_cut_or_pale(open_page, server, workflow, probed, locale, nodes_2, artifacts):
    """At the nodes' own and their least size, at 100 % and 150 %, light and dark."""
    page = open_page(nodes_2=nodes_2, locale=locale, fresh=True)
    try:
        for theme in ("dark", "light"):
            page.page.evaluate(
                "theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme
            )
            page.load(workflow)
            plan = Plan(page)
            name = f"{theme}_{locale}_{'nodes_2' if nodes_2 else 'classic'}"
            for budget in (8, 1, 0):
                set_widgets(page, FIT, budget_gib=budget)
                plan.wait_for("verdict", {8: "8 GiB", 1: "1 GiB", 0: NO_LIMIT[locale]}[budget])
                assert plan.element.locator(".stock").count() > 0
                for size in _sizes(page, FIT):
                    _check(plan.element, f"Fit to VRAM {budget} GiB {size}", name)
            page.load(probed)
            probe = Probe(page, ON_MODEL)
            small = {**_card_record()["device"], "total_bytes": 16 * GiB}
            for changed in (
                {"state": "running"},
                {"state": "interrupted", "is_at_least": True},
                {"state": "done", "device": small},
            ):
                _send(page, str(ON_MODEL), _card_record(**changed))
                probe.wait_for_chart()
                for size in _sizes(page, ON_MODEL):
                    _check(probe.element, f"VRAM Probe {changed['state']} {size}", name)
            probe.part("figures").click()
            probe.part("details").get_by_text("A card").first.wait_for()
            for size in _sizes(page, ON_MODEL):
                _check(probe.element, f"VRAM Probe figures {size}", name)
            page.keep_screenshot(artifacts, f"panels_{name}")
        assert page.faults == []
    finally:
        server.post_json("/settings/Comfy.ColorPalette", "dark")


def _sizes(page: ComfyPage, node_id: int):
    """Shows the node at its own size, then at its least, at 100 % and at 150 %."""
    own = page.page.evaluate("id => [...app.graph.getNodeById(id).size]", node_id)
    least = page.page.evaluate("id => [...app.graph.getNodeById(id).computeSize()]", node_id)
    for size in (own, least):
        for scale in (1, 1.5):
            page.page.evaluate(
                """([id, size, scale]) => { const node = app.graph.getNodeById(id);
                    const {ds} = app.canvas; node.setSize(size); ds.scale = scale;
                    ds.offset[0] = 300 / scale - node.pos[0];
                    ds.offset[1] = 60 / scale - node.pos[1]; app.canvas.setDirty(true, true) }""",
                [node_id, size, scale],
            )
            page.settle()
            yield f"{size} at {scale}"
    page.page.evaluate(
        """([id, size]) => { app.graph.getNodeById(id).setSize(size);
            app.canvas.setDirty(true, true) }""",  # else the next click's own move draws it so
        [node_id, own],
    )
    page.settle()
