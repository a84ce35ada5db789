"""Every example workflow as a new user sees it: no overlap, no cut text, no empty half."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs Playwright")

from pack.testing.example_workflows import NAMES, read
from pack.testing.link_lines import faults, slot_point
from pack.tests.e2e.layout_page import (
    Seen,
    as_seen,
    empty,
    flat,
    look,
    overlaps,
    show_results,
    strays,
    wait_for_panels,
)
from pack.tests.e2e.page import ComfyPage

pytestmark = [pytest.mark.browser, pytest.mark.once]

RENDERERS = pytest.mark.parametrize("nodes_2", [False, True], ids=["classic canvas", "nodes 2.0"])
CHOICE = ("z_image_turbo_8gib", "flux_2_dev_low_vram")
SLOT_PX = 12  # how far a renderer's own rows may lie from those that link_lines assumes


def _seen(page: ComfyPage, workflow: dict[str, Any]) -> Seen:
    page.load(workflow)
    wait_for_panels(page)
    return look(page)


def _least(page: ComfyPage, workflow: dict[str, Any]) -> dict[int, float] | None:
    """Heights that the contents need in Nodes 2.0; the classic canvas tells by itself."""
    if not page.nodes_2:
        return None
    return {node["id"]: node["box"][3] for node in _seen(page, flat(workflow)).nodes}


@RENDERERS
@pytest.mark.parametrize("name", NAMES)
def test_layout(open_page, name: str, nodes_2: bool) -> None:
    workflow = read(name)
    page = open_page(nodes_2=nodes_2)
    least = _least(page, workflow)
    seen = _seen(page, workflow)
    assert overlaps(seen) == []
    assert strays(seen) == []
    assert seen.cut == []
    assert empty(seen, least) == []
    show_results(page, workflow)
    after = look(page)
    assert overlaps(after) == []
    assert strays(after) == []
    assert faults(as_seen(workflow, after)).behind == []


@RENDERERS
def test_light_theme_at_150_percent(open_page, artifacts, nodes_2: bool) -> None:
    page = open_page(nodes_2=nodes_2, fresh=True)
    scale = {"width": 1067, "height": 600, "deviceScaleFactor": 1.5, "mobile": False}
    session = page.page.context.new_cdp_session(page.page)
    session.send("Emulation.setDeviceMetricsOverride", scale)
    choose = "name => app.extensionManager.setting.set('Comfy.ColorPalette', name)"
    page.page.evaluate(choose, "light")
    try:
        for name in CHOICE:
            seen = _seen(page, read(name))
            page.keep_screenshot(artifacts, f"light_150_{name}_{nodes_2}")
            assert overlaps(seen) == [] and strays(seen) == [] and seen.cut == [], name
    finally:
        page.page.evaluate(choose, "dark")


@RENDERERS
def test_a_bad_layout_is_told(open_page, nodes_2: bool) -> None:
    good = read("z_image_turbo")
    page = open_page(nodes_2=nodes_2)
    least = _least(page, good)

    def changed(node_id: int, **values: Any) -> Seen:
        bad = copy.deepcopy(good)
        next(node for node in bad["nodes"] if node["id"] == node_id).update(values)
        return _seen(page, bad)

    loader, sampler, save, note = 1, 5, 7, 8
    at = next(node["pos"] for node in good["nodes"] if node["id"] == loader)
    assert (loader, sampler) in overlaps(changed(sampler, pos=[at[0] + 40, at[1] + 40]))
    assert strays(changed(sampler, pos=[at[0], 5000])) == [sampler]
    assert [found for found, _ in empty(changed(save, size=[340, 600]), least)] == [save]
    assert [found for found, _ in empty(changed(note, size=[480, 700]), least)] == [note]
    wide = "a_name_without_a_place_to_break_" * 4
    told = changed(
        note, size=[300, 400], widgets_values=[f"| a | b |\n| --- | --- |\n| {wide} | c |"]
    )
    assert [found for found, *_ in told.cut if found == note]
    if not nodes_2:  # Nodes 2.0 makes the node higher
        told = changed(note, size=[480, 120])
        assert [found for found, *_ in told.cut if found == note]


def test_links_end_where_they_are_counted(open_page) -> None:
    """tests/testing/test_link_lines.py counts links by these points."""
    page = open_page(nodes_2=False)
    for name in ("flux_2_dev_low_vram", "z_image_turbo_1gib"):
        workflow = read(name)
        page.load(workflow)
        nodes = {node["id"]: node for node in workflow["nodes"]}
        for _, source, out, target, slot, _ in workflow["links"]:
            given = page.page.evaluate(
                """([a, i, b, j]) => [[...app.graph.getNodeById(a).getOutputPos(i)],
                    [...app.graph.getNodeById(b).getInputPos(j)]]""",
                [source, out, target, slot],
            )
            start = slot_point(nodes[source], out, is_output=True)
            end = slot_point(nodes[target], slot, is_output=False)
            for found, wanted in zip(given, (start, end), strict=True):
                assert found == pytest.approx(wanted, abs=SLOT_PX), (name, source, target)
