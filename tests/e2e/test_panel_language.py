"""On the Chinese page both panels speak Chinese, those texts too that the server sends."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs Playwright")

from pack.tests.chinese_rules import english
from pack.tests.e2e.conftest import forget
from pack.tests.e2e.page import ComfyPage
from pack.tests.e2e.test_fit_page import FIT, SAMPLER, SIDE_PX, SIZE, STEPS, Plan, set_widgets
from pack.tests.e2e.test_fit_page import workflow as workflow
from pack.tests.e2e.test_probe_page import ON_IMAGE, ON_MODEL, Probe
from pack.tests.e2e.test_probe_page import probed as probed
from playwright.sync_api import Locator

pytestmark = [pytest.mark.browser, pytest.mark.once]

both_renderers = pytest.mark.parametrize(
    "nodes_2", [pytest.param(False, id="classic canvas"), pytest.param(True, id="nodes 2.0")]
)
# Every text of a panel, hidden ones and those for screen readers among them.
TEXTS = """host => {
    const root = host.shadowRoot, found = [];
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    for (let node = walk.nextNode(); node; node = walk.nextNode()) found.push(node.data);
    for (const element of root.querySelectorAll("*")) {
        for (const name of ["aria-label", "aria-valuetext", "title"]) {
            found.push(element.getAttribute(name) ?? "");
        }
    }
    return found.filter(text => text.trim()) }"""
CODE_LINE = re.compile(r"\S+\.py:\d+ \S+")  # where a tensor was made


def _check(panel: Locator, least: int = 8) -> None:
    texts = [CODE_LINE.sub("", text) for text in panel.evaluate(TEXTS)]
    assert {text: words for text in texts if (words := english(text))} == {}
    assert len([text for text in texts if re.search("[\u4e00-\u9fff]", text)]) >= least


def _set_all(page: ComfyPage, values: dict[int, dict[str, Any]]) -> None:
    for node_id, widgets in values.items():
        set_widgets(page, node_id, **widgets)


@both_renderers
def test_fit_to_vram(open_page, server, workflow, artifacts, nodes_2):
    forget(server)
    page = open_page(nodes_2=nodes_2, locale="zh", fresh=True)
    page.load(workflow)
    plan = Plan(page)
    for widgets, part, words in (
        ({FIT: {"budget_gib": 8}}, "verdict", "8 GiB 放得下"),
        ({SIZE: {"width": 8192, "height": 8192, "batch_size": 2}}, "offers", "放得下的设置"),
        ({FIT: {"budget_gib": 0}}, "verdict", "没有上限"),
        ({FIT: {"prefer": "nonsense"}}, "error", "prefer 只能是"),
        ({FIT: {"prefer": "balance", "budget_gib": None}}, "error", "budget_gib 必须是数字"),
        ({FIT: {"budget_gib": 8}, SIZE: {"width": 4}}, "error", "width_px 必须 >= 8"),
    ):
        _set_all(page, widgets)
        plan.wait_for(part, words)
        _check(plan.element, 2 if part == "error" else 8)
    small = {"width": SIDE_PX, "height": SIDE_PX, "batch_size": 1}
    _set_all(page, {SIZE: small, SAMPLER: {"steps": STEPS}})
    page.run()
    plan.wait_for("foot", "最近一次运行时")
    settings = plan.element.locator(".setting").all_text_contents()
    assert settings[0].startswith("ComfyUI 自己的代码")
    assert [one.split("prefer")[0] for one in settings[1:]] == [
        "应用梯度检查点\uff1a",
        "精简 VAE\uff1abalance",
    ]
    _check(plan.element)
    page.keep_screenshot(artifacts, f"fit_zh_{'nodes_2' if nodes_2 else 'classic'}")
    assert page.faults == []


@both_renderers
def test_vram_probe(open_page, server, probed, artifacts, nodes_2):
    forget(server)
    page = open_page(nodes_2=nodes_2, locale="zh", fresh=True)
    page.load(probed)
    probes = [Probe(page, node_id) for node_id in (ON_MODEL, ON_IMAGE)]
    for probe in probes:
        _check(probe.element, 1)
    kept = {"history": "append a row"}
    _set_all(
        page,
        {
            ON_MODEL: {"label": "", "detail": "allocations", **kept},
            ON_IMAGE: {"label": "解码", "mode": "measure", **kept},
        },
    )
    page.run()
    for probe in probes:
        probe.wait_for_chart()
        _check(probe.element)
        for share in (0.05, 0.5, 0.95):
            probe.hover(share)
            _check(probe.element)
        probe.part("figures").click()
        for name in ("torch 已分配", "本进程的内存", "本次运行的各个探针"):
            probe.part("details").get_by_text(name).first.wait_for()
        _check(probe.element, 20)
        page.keep_screenshot(artifacts, f"probe_zh_{probe.node_id}_{nodes_2}")
    page.run()  # everything comes from the cache
    probes[0].part("state.earlier").wait_for()
    _check(probes[0].element, 20)
    assert page.faults == []
