"""What the page shows of a workflow's layout: boxes, groups, cut texts, empty room."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

from pack.testing.link_lines import TITLE_PX
from pack.tests.e2e.page import ComfyPage

MOST_EMPTY = 1 / 3  # of a node's height
RESULT_PX = 1024  # side of the picture that a run gives out
_ROUNDING_PX = 2

# Boxes in the graph's pixels. `used` is what the content needs. In Nodes 2.0 `least` is not known.
_LOOK = """() => {
    const {ds, canvas} = app.canvas, view = canvas.getBoundingClientRect(), nodes = [];
    const hides = style => style !== "visible";
    const cut = [];
    const walk = (root, id, label) => {
        for (const e of root.querySelectorAll("*")) {
            if (e.shadowRoot) walk(e.shadowRoot, id, label);
            if (e.matches(".comfy-markdown textarea")) continue; // the source, hidden until edited
            const style = getComputedStyle(e), text = (e.value ?? e.textContent ?? "").trim();
            if (!text || e.clientWidth < 2 || style.visibility === "hidden") continue;
            const wide = hides(style.overflowX) && e.scrollWidth > e.clientWidth + 1;
            const high = hides(style.overflowY) && e.scrollHeight > e.clientHeight + 1;
            if (wide || high) cut.push([Number(id), text.slice(0, 60), wide ? "width" : "height"]);
        }
    };
    for (const node of app.graph.nodes) {
        const element = document.querySelector(`[data-node-id="${node.id}"]`);
        let [x, y, width, height] = node.boundingRect, least = node.computeSize()[1];
        if (element) {
            const box = element.getBoundingClientRect();
            [x, y] = [(box.x - view.x) / ds.scale - ds.offset[0],
                (box.y - view.y) / ds.scale - ds.offset[1]];
            [width, height] = [box.width / ds.scale, box.height / ds.scale];
            walk(element, node.id);
        }
        const texts = element ?? node.widgets?.find(w => w.element)?.element;
        if (!element) for (const {element: panel} of node.widgets ?? []) {
            if (!panel) continue;
            const holder = panel.closest(".dom-widget") ?? panel.parentElement;
            if (panel.shadowRoot) walk(panel.shadowRoot, node.id);
            if (holder) walk(holder, node.id);
        }
        let room = null;
        if (node.type === "MarkdownNote") {
            const shown = texts?.querySelector("table");
            const zoom = shown.getBoundingClientRect().width / shown.offsetWidth;
            const frame = (element ?? shown.closest(".comfy-markdown")).getBoundingClientRect();
            room = (frame.bottom - shown.getBoundingClientRect().bottom) / zoom;
            if (room < -1) cut.push([Number(node.id), "the table", "height"]);
        }
        nodes.push({id: Number(node.id), type: node.type, box: [x, y, width, height], least, room});
    }
    const groups = app.graph.groups.map(g => [...g.boundingRect ?? g._bounding]);
    return {nodes, groups, cut};
}"""

# What a run adds: the text of a node of ours, and the picture below Save Image.
_AFTER = """async ([texts, saves, side]) => {
    app.canvas.min_font_size_for_lod = 0; // else a small zoom draws no picture, so no node grows
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const blob = await new Promise(done => canvas.toBlob(done));
    const body = new FormData();
    body.append("image", blob, "layout.png");
    body.append("overwrite", "true");
    await app.api.fetchApi("/upload/image", {method: "POST", body});
    for (const id of texts) app.api.dispatchCustomEvent("progress_text",
        {nodeId: String(id), prompt_id: "layout", text: "predicted: one\\ntwo\\nthree"});
    const images = [{filename: "layout.png", subfolder: "", type: "input"}];
    for (const id of saves) app.api.dispatchCustomEvent("executed",
        {node: String(id), display_node: String(id), prompt_id: "layout", output: {images}});
}"""
TYPED_IN = ("CLIPTextEncode", "TextEncodeQwenImageEditPlus")  # a field for a text of any length
TELL = ("ZImageTurboLoader", "ZImageGradientCheckpoint", "ZImageAttentionSlice", "ZImageLeanVAE")

Box = list[float]


class Seen(NamedTuple):
    """A workflow as one renderer shows it; ``nodes`` have id, type, box, least and room."""

    nodes: list[dict[str, Any]]
    groups: list[Box]
    cut: list[list[Any]]


def look(page: ComfyPage) -> Seen:
    return Seen(**page.page.evaluate(_LOOK))


def wait_for_panels(page: ComfyPage) -> None:
    """Returns when each panel of ours shows its plan, or what it says before a run."""
    page.page.wait_for_function(
        """() => app.graph.nodes.flatMap(node => node.widgets ?? []).every(widget => {
            const part = {vram_plan: ".verdict", vram_chart: ".empty"}[widget.name];
            return !part || widget.element.shadowRoot.querySelector(part).textContent })"""
    )
    page.settle()


def show_results(page: ComfyPage, workflow: dict[str, Any]) -> None:
    """Shows on the nodes what they would show after a run."""
    nodes = workflow["nodes"]
    texts = [node["id"] for node in nodes if node["type"] in TELL]
    saves = [node["id"] for node in nodes if node["type"] == "SaveImage"]
    page.page.evaluate(_AFTER, [texts, saves, RESULT_PX])
    for node_id in saves:
        page.wait_for_preview(node_id, RESULT_PX)
    page.settle()


def flat(workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with nodes of no height; the page makes each as high as its content."""
    flat = copy.deepcopy(workflow)
    for node in flat["nodes"]:
        node["size"][1] = 1
    return flat


def as_seen(workflow: dict[str, Any], seen: Seen) -> dict[str, Any]:
    """The workflow with nodes of the sizes that the page gives them."""
    grown = copy.deepcopy(workflow)
    boxes = {node["id"]: node["box"] for node in seen.nodes}
    for node in grown["nodes"]:
        _, _, width, height = boxes[node["id"]]
        node["size"] = [width, height - TITLE_PX]
    return grown


def _meets(one: Box, other: Box) -> bool:
    return all(
        one[i] + one[i + 2] > other[i] + _ROUNDING_PX
        and other[i] + other[i + 2] > one[i] + _ROUNDING_PX
        for i in (0, 1)
    )


def _holds(outer: Box, inner: Box) -> bool:
    return all(
        outer[i] - _ROUNDING_PX <= inner[i]
        and inner[i] + inner[i + 2] <= outer[i] + outer[i + 2] + _ROUNDING_PX
        for i in (0, 1)
    )


def overlaps(seen: Seen) -> list[tuple[int, int]]:
    """Pairs of nodes whose boxes meet, and (-1, -1) for groups that do."""
    pairs = itertools.combinations(seen.nodes, 2)
    met = [(one["id"], other["id"]) for one, other in pairs if _meets(one["box"], other["box"])]
    met += [(-1, -1) for pair in itertools.combinations(seen.groups, 2) if _meets(*pair)]
    return met


def strays(seen: Seen) -> list[int]:
    """Nodes that are not within one group; notes that are not outside of all."""
    stray = []
    for node in seen.nodes:
        touched = [group for group in seen.groups if _meets(group, node["box"])]
        wanted = 0 if node["type"] == "MarkdownNote" else 1
        if len(touched) != wanted or not all(_holds(group, node["box"]) for group in touched):
            stray.append(node["id"])
    return stray


def empty(seen: Seen, least: dict[int, float] | None = None) -> list[tuple[int, float]]:
    """Nodes with too much empty height, and its share. A field to type in is never empty.

    Args:
        least: heights that the contents need, by node; the page's own figure if None.
    """
    found = []
    for node in seen.nodes:
        height = node["box"][3]
        needed = least[node["id"]] if least else node["least"] + TITLE_PX
        room = height - needed if node["room"] is None else node["room"]
        if node["type"] not in TYPED_IN and room > MOST_EMPTY * height:
            found.append((node["id"], round(room / height, 2)))
    return found
