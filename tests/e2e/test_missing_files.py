"""A new user's page: no model file is there. It lists each workflow's files and offers them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pack.runner.live_host import HostError, LiveHost

pytest.importorskip("playwright", reason="needs Playwright")

from pack.testing.example_workflows import NAMES, api_prompt, inputs_of, model_files, nodes, read

pytestmark = pytest.mark.browser

PLAIN, LOADER, LOADER_ID = "z_image_turbo", "ZImageTurboLoader", 1
ALL_MISSING = "Missing: z_image_turbo_bf16.safetensors in models/diffusion_models"
RENDERERS = pytest.mark.parametrize(
    "nodes_2", [False, pytest.param(True, marks=pytest.mark.once)], ids=["classic", "nodes 2.0"]
)
# Of a widget's text, what is there only after scrolling.
HIDDEN_PX = """widget => Math.max(...[...widget.querySelectorAll("*")]
    .filter(e => getComputedStyle(e).overflowY !== "visible")
    .map(e => e.scrollHeight - e.clientHeight))"""
# The page downloads by pressing a link of its own making; nothing outside can be reached here.
NOTE_DOWNLOADS = """() => { window.downloads = [];
    HTMLAnchorElement.prototype.click = function () {
        window.downloads.push([this.download, this.href]) } }"""


class Offer(NamedTuple):
    """A missing file that the page offers."""

    name: str
    directory: str
    url: str


@pytest.fixture(scope="module")
def empty(host_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveHost]:
    """A server with the pack and no model file."""
    with LiveHost(host_dir, tmp_path_factory.mktemp("new_user")) as live:
        yield live


@pytest.fixture
def open_empty(browser: Any, empty: LiveHost) -> Iterator[Any]:
    from pack.tests.e2e.page import ComfyPage

    opened: list[Any] = []

    def open_one(*, nodes_2: bool) -> Any:
        page = ComfyPage(browser, empty, nodes_2=nodes_2)
        opened.append(page)
        page.page.evaluate(NOTE_DOWNLOADS)
        return page

    yield open_one
    for page in opened:
        page.close()


def offers(page: Any) -> set[Offer]:
    """Every missing file that the page lists with a button to download it, and its address."""
    shown = page.page
    panel = shown.get_by_test_id("error-group-missing-model")
    dialog = shown.locator(".comfy-missing-models")  # of ComfyUI 0.16.3
    message = shown.get_by_test_id("error-overlay-see-errors")
    message.or_(dialog).first.wait_for()
    if dialog.is_visible():
        return _in_dialog(shown, dialog)
    if not panel.is_visible():
        message.click()
        panel.wait_for()
    found = set()
    for row in panel.get_by_test_id("missing-model-importable-rows").locator("> div").all():
        shown.evaluate("window.downloads = []")
        row.get_by_role("button", name="Download").click()
        ((name, url),) = shown.evaluate("window.downloads")
        words = row.inner_text().split()
        found.add(Offer(name, words[words.index(name) + 1], url))
    return found


def _in_dialog(shown: Any, dialog: Any) -> set[Offer]:
    """The older page's; without a network its button opens the repository, so it is not pressed."""
    found = set()
    for row in dialog.get_by_role("option").all():
        button = row.get_by_role("button", name="Download")
        directory, name = row.locator("span[title]").inner_text().split(" / ")
        found.add(Offer(name, directory, button.get_attribute("title")))
    _close_dialog(shown)
    return found


def _close_dialog(shown: Any) -> None:
    """The older page's, which covers the canvas; the newer one shows a message beside it."""
    dialog = shown.locator(".comfy-missing-models")
    dialog.or_(shown.get_by_test_id("error-overlay-see-errors")).first.wait_for()
    if dialog.is_visible():
        shown.keyboard.press("Escape")
        dialog.wait_for(state="hidden")


@RENDERERS
def test_the_page_offers_each_file_of_each_workflow(open_empty, empty, nodes_2):
    page = open_empty(nodes_2=nodes_2)
    known, opened = set(empty.get_json("/object_info")), []
    for name in NAMES:
        workflow = read(name)
        if {node["type"] for node in nodes(workflow)} - known:
            continue  # the older host has no such node, and asks for it first
        page.load(workflow)
        wanted = {Offer(f["name"], f["directory"], f["url"]) for f in model_files(workflow)}
        assert offers(page) == wanted, name
        opened.append(name)
    assert PLAIN in opened
    assert len(opened) >= len(NAMES) - 2, "the older host lacks a node of two workflows at most"


def test_a_run_without_files_says_which_file_goes_where(open_empty, empty, artifacts):
    page = open_empty(nodes_2=False)
    page.load(read(PLAIN))
    offers(page)
    text = said_by_the_loader(page)
    page.keep_screenshot(artifacts, "run_without_files")
    assert text.startswith(ALL_MISSING)
    assert "qwen_3_4b.safetensors in models/text_encoders" in text
    assert "ae.safetensors in models/vae" in text
    assert "get them from Comfy-Org/z_image_turbo" in text
    shown = page.page.locator(".dom-widget").filter(has_text=ALL_MISSING)
    assert shown.evaluate(HIDDEN_PX) == 0, "the node is too low for the sentence"
    assert page.page.get_by_text("not in list").count() == 0


@RENDERERS
def test_the_name_of_a_file_is_no_html(open_empty, nodes_2):
    """A workflow brings it from anywhere; ComfyUI 0.16.3 shows texts as HTML."""
    page = open_empty(nodes_2=nodes_2)
    workflow = read(PLAIN)
    loader = next(node for node in workflow["nodes"] if node["id"] == LOADER_ID)
    loader["widgets_values"][0] = """<img src=x onerror="window.harmed = true">.safetensors"""
    page.load(workflow)
    _close_dialog(page.page)
    said = said_by_the_loader(page)
    assert said.startswith("Missing: \u2039img src=x onerror=")
    page.page.get_by_text("Missing: \u2039img").first.wait_for()
    assert page.page.evaluate("window.harmed") is None


def said_by_the_loader(page: Any) -> str:
    """What a run without files shows on its node."""
    queue = page.page.get_by_test_id("queue-button")
    queue.locator("button").first.or_(queue).first.click()
    page.page.wait_for_function(f"app.graph.getNodeById({LOADER_ID}).widgets.length > 5")
    page.settle()
    return page.node(LOADER_ID)["texts"][-1]


def test_a_new_node_without_files_says_the_same(open_empty, artifacts):
    """The page gives the node its first values, and the prompt is not refused for an empty list."""
    page = open_empty(nodes_2=False)
    page.load({**read(PLAIN), "nodes": [], "links": [], "groups": []})
    page.page.evaluate(
        "kind => app.graph.add(Object.assign(LiteGraph.createNode(kind), {pos: [0, 0]}))", LOADER
    )
    page.settle()
    (node,) = page.api_prompt().values()
    assert node["inputs"]["diffusion_model"] == "no file yet"
    page.keep_screenshot(artifacts, "new_loader_without_files")


def test_over_http_the_prompt_fails_with_the_sentence(empty):
    schemas = empty.get_json("/object_info")
    prompt = api_prompt(read(PLAIN), lambda kind: inputs_of(schemas[kind]["input"]), is_older=True)
    with pytest.raises(HostError, match=ALL_MISSING):
        empty.wait(empty.queue(prompt), 60)
