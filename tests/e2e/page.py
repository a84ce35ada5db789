"""ComfyUI's page in a real browser: open it, load a workflow, run it, look at a node."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

from pack.runner.live_host import LiveHost
from PIL import Image, ImageStat
from playwright.sync_api import Browser, ConsoleMessage, Locator, Playwright

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
# No sandbox: the tests may run as root. The others keep the browser from calling home.
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
VIEWPORT = {"width": 1600, "height": 900}
READY = (
    "window.app?.extensionManager && app.canvas"
    " && Object.keys(LiteGraph.registered_node_types).length > 300"
)
RUN_ENDS = ["execution_success", "execution_error", "execution_interrupted"]
TIMEOUT_MS = 120_000
TOOLTIP_TIMEOUT_MS = 10_000
TOOLTIP_DELAY_MS = 50
PACK_WORDS = ("z-image-low-vram", "ZImage")


def find_chromium() -> str | None:
    """ZIMAGE_CHROMIUM, else a Chromium of this machine."""
    named = os.environ.get("ZIMAGE_CHROMIUM")
    return named or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)


def launch(playwright: Playwright, chromium: str) -> Browser:
    return playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)


# The view moves, and Nodes 2.0 measures its nodes, over several frames.
AT_REST = """() => new Promise(done => {
    let last, frames = 0;
    const look = () => {
        const now = JSON.stringify([app.canvas.ds.scale, ...app.canvas.ds.offset]);
        frames = now === last ? frames + 1 : 0;
        last = now;
        frames < 20 ? requestAnimationFrame(look) : done();
    };
    look();
})"""


class ComfyPage:
    """One open page of a running host.

    Args:
        nodes_2: draw nodes with Nodes 2.0 instead of the classic canvas.
        locale: the page's language, such as "en" or "zh".
        scale: pixels of a screenshot for each pixel of the page.
    """

    def __init__(
        self,
        browser: Browser,
        host: LiveHost,
        *,
        nodes_2: bool,
        locale: str = "en",
        scale: float = 1,
    ):
        self.host = host
        self.nodes_2 = nodes_2
        host.post_json("/settings/Comfy.VueNodes.Enabled", nodes_2)
        host.post_json("/settings/Comfy.Locale", locale)
        host.post_json("/settings/LiteGraph.Node.TooltipDelay", TOOLTIP_DELAY_MS)
        self.faults: list[str] = []
        self.page = browser.new_page(viewport=VIEWPORT, device_scale_factor=scale)
        self.page.set_default_timeout(TIMEOUT_MS)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("console", self._note_message)
        self.page.goto(host.url)
        self.page.wait_for_function(READY)

    def _note_message(self, message: ConsoleMessage) -> None:
        told = f"{message.text} ({message.location.get('url', '')})"
        if message.type in ("error", "warning") and any(word in told for word in PACK_WORDS):
            self.faults.append(told)

    def load(self, workflow: dict[str, Any]) -> None:
        """Opens the workflow and brings all of it into view."""
        there = "workflow => workflow.nodes.every(node => app.graph.getNodeById(node.id))"
        for _ in range(2):
            self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
            self.settle()
            if self.page.evaluate(there, workflow):
                break  # else a slow page's own first graph came after ours and replaced it
        self.page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.settle()

    def settle(self) -> None:
        """Returns when the view has come to rest."""
        self.page.evaluate(AT_REST)

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_function(READY)

    def api_prompt(self) -> dict[str, Any]:
        """What the page would send to the server, in the API format."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def run(self) -> str:
        """Presses the page's Run button and waits for the end; returns the prompt's id."""
        self.page.evaluate(
            """kinds => { window.endOfRun = null; kinds.forEach(kind => app.api.addEventListener(
                kind, event => window.endOfRun ??= {kind, ...event.detail})) }""",
            RUN_ENDS,
        )
        self.page.get_by_test_id("queue-button").click()
        end = self.page.wait_for_function("window.endOfRun").json_value()
        assert end["kind"] == "execution_success", end.get("exception_message", end)
        return end["prompt_id"]

    def wait_for_preview(self, node_id: int, side_px: int) -> None:
        """Returns when the node shows a picture that wide."""
        if self.nodes_2:
            width = f"document.querySelector('[data-node-id=\"{node_id}\"] img')?.naturalWidth"
        else:
            width = f"app.graph.getNodeById({node_id}).imgs?.[0]?.naturalWidth"
        self.page.wait_for_function(f"{width} === {side_px}")
        self.settle()  # the frame that draws it
        if not self.nodes_2:  # that frame makes the node higher, and only the next one shows it so
            self.page.evaluate("app.canvas.setDirty(true, true)")
            self.settle()

    def dom_node(self, node_id: int) -> Locator:
        """The node's element; only Nodes 2.0 has one."""
        return self.page.locator(f'[data-node-id="{node_id}"]')

    def node(self, node_id: int) -> dict[str, Any]:
        """The node as the page has it: title, labels of its slots, names and texts of widgets."""
        return self.page.evaluate(
            """id => { const node = app.graph.getNodeById(id); return {
                title: node.getTitle(),
                labels: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.label])),
                texts: (node.widgets ?? []).map(w => String(w.value)),
                known: node.type in LiteGraph.registered_node_types,
                outputs: node.outputs.map(o => o.localized_name ?? o.name)} }""",
            node_id,
        )

    def on_screen(self, *node_ids: int) -> dict[str, float]:
        """The smallest rectangle of the screen that holds these nodes with titles, in pixels."""
        return self.page.evaluate(
            """ids => { const {ds, canvas} = app.canvas, view = canvas.getBoundingClientRect();
                const boxes = ids.map(id => app.graph.getNodeById(id).boundingRect);
                const left = Math.min(...boxes.map(b => b[0]));
                const top = Math.min(...boxes.map(b => b[1]));
                const right = Math.max(...boxes.map(b => b[0] + b[2]));
                const bottom = Math.max(...boxes.map(b => b[1] + b[3]));
                return {x: view.left + (left + ds.offset[0]) * ds.scale,
                    y: view.top + (top + ds.offset[1]) * ds.scale,
                    width: (right - left) * ds.scale, height: (bottom - top) * ds.scale} }""",
            list(node_ids),
        )

    def spread(self, node_id: int) -> float:
        """Standard deviation of the node's pixels on the screen, 0 to 128; 0 is one colour.

        Looks at it in the middle of the screen: the page's own side panel may cover the edge.
        """
        offset = self.page.evaluate("[...app.canvas.ds.offset]")
        self.page.evaluate("id => app.canvas.centerOnNode(app.graph.getNodeById(id))", node_id)
        self.settle()
        box = self.on_screen(node_id)
        picture = Image.open(io.BytesIO(self.page.screenshot(clip=box))).convert("L")
        self.page.evaluate(
            """([x, y]) => { const {ds} = app.canvas; [ds.offset[0], ds.offset[1]] = [x, y];
                app.canvas.setDirty(true, true) }""",
            offset,
        )
        self.settle()
        return ImageStat.Stat(picture).stddev[0]

    def tooltip(self, node_id: int, widget: str, label: str) -> str:
        """What the page shows when the mouse rests on that widget."""
        if self.nodes_2:
            shown = self.page.locator(".p-tooltip-text")
            # The last, because an output above the widgets may have the same name.
            self.dom_node(node_id).get_by_text(label, exact=True).last.hover()
        else:
            shown = self.page.locator(".node-tooltip")
            x, y = self.page.evaluate(
                """([id, name]) => { const {ds, canvas} = app.canvas;
                const node = app.graph.getNodeById(id), box = canvas.getBoundingClientRect();
                const widget = node.widgets.find(w => w.name === name);
                return [box.left + (node.pos[0] + node.size[0] / 2 + ds.offset[0]) * ds.scale,
                    box.top + (node.pos[1] + widget.last_y + 10 + ds.offset[1]) * ds.scale] }""",
                [node_id, widget],
            )
            self.page.mouse.move(x + 3, y)
            self.page.mouse.move(x, y)
        shown.wait_for(state="visible", timeout=TOOLTIP_TIMEOUT_MS)
        text = shown.inner_text()
        self.page.mouse.move(5, VIEWPORT["height"] - 5)
        shown.wait_for(state="hidden", timeout=TOOLTIP_TIMEOUT_MS)
        return text

    def open_help(self, node_id: int, heading: str) -> str:
        """Selects the node, presses its Info button; the help text once it has that heading."""
        box = self.on_screen(node_id)
        title_y = box["y"] + 12
        self.page.mouse.click(box["x"] + box["width"] * 0.6, title_y)
        help_text = self.page.locator(".node-help-content")
        if not help_text.is_visible():  # once open, it follows the selection
            self.page.get_by_test_id("info-button").click()
        help_text.get_by_role("heading", name=heading, exact=True).first.wait_for()
        return help_text.inner_text()

    def keep_graph(self, folder: Path, name: str, workflow: dict[str, Any]) -> None:
        """Keeps the part of the screen that holds the workflow's groups and nodes."""
        box = self.on_screen(*(node["id"] for node in workflow["nodes"]))
        margin = box["width"] / 40
        box |= {"x": box["x"] - margin, "width": box["width"] + 2 * margin}
        box |= {"y": box["y"] - 2 * margin, "height": box["height"] + 3 * margin}
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png", clip=box)

    def keep_screenshot(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"{name}.png")

    def close(self) -> None:
        self.page.close()
