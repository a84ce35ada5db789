"""The charts of memory in a browser: every text has room, and none lies on another."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pack.runner.demo_figures import Compared
from pack.tests.runner.test_demo_figures import ALONE, OURS
from playwright.sync_api import Browser

REPO = Path(__file__).resolve().parents[2]
PICTURES = sorted((REPO / "docs" / "pictures").glob("vram_*.svg"))
BOXES = """() => [...document.querySelectorAll('text')].map(text => {
    const {x, y, width, height} = text.getBBox();
    return {words: text.textContent, x, y, width, height};
})"""
SPARE_PX = 4  # at the edges


def boxes(browser: Browser, path: Path) -> list[dict[str, Any]]:
    page = browser.new_page()
    try:
        page.goto(path.as_uri())
        return page.evaluate(BOXES)
    finally:
        page.close()


def faults(found: list[dict[str, Any]], width: float, height: float) -> list[str]:
    """Texts that leave the picture, and pairs that overlap."""
    made = []
    for number, box in enumerate(found):
        right, bottom = box["x"] + box["width"], box["y"] + box["height"]
        if not (box["x"] >= SPARE_PX and right <= width - SPARE_PX):
            made.append(f"{box['words']}: {box['x']:.0f} to {right:.0f} of {width}")
        if not (box["y"] >= 0 and bottom <= height):
            made.append(f"{box['words']}: ends at {bottom:.0f} of {height}")
        for other in found[number + 1 :]:
            beside = other["x"] >= right or other["x"] + other["width"] <= box["x"]
            apart = other["y"] >= bottom or other["y"] + other["height"] <= box["y"]
            if not (beside or apart):
                made.append(f"{box['words']} / {other['words']}")
    return made


@pytest.mark.browser
@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_the_readmes_chart_has_room_for_its_texts(browser, path):
    found = boxes(browser, path)
    assert len(found) > 20
    assert faults(found, 800, 572) == []


@pytest.mark.browser
@pytest.mark.parametrize(
    "options",
    [
        ["--width=2560", "--height=2560"],
        ["--width=8192", "--height=8192", "--batch=16", "--vram=12.5", "--img2img",
         "--controlnet", "--weights=nvfp4"],
        ["--width=4096", "--height=4096", "--vram=1.5"],
        ["--family=flux2", "--width=2048", "--height=2048", "--batch=16", "--references=3"],
    ],
)  # fmt: skip
def test_a_plans_chart_has_room_for_its_texts(browser, tmp_path, options):
    path = tmp_path / "plan.svg"
    command = [sys.executable, "-S", str(REPO / "run.py"), "plan", "--chart", str(path), *options]
    subprocess.run(command, capture_output=True, timeout=60)
    found = boxes(browser, path)
    size = re.search(r'width="(\d+)" height="(\d+)"', path.read_text("utf-8"))
    assert size and len(found) > 10
    assert faults(found, int(size[1]), int(size[2])) == []


@pytest.mark.browser
@pytest.mark.parametrize("on_card", [False, True])
def test_the_demos_charts_have_room_for_their_texts(browser, tmp_path, on_card):
    chart = Compared("1024x1024, 8 steps, on the card", ALONE, OURS, on_card).chart().split("<svg ")
    for number, part in enumerate(chart[2:]):  # what is in the outermost one
        path = tmp_path / f"{number}.svg"
        inner = f"<svg {part}".replace(' y="', ' data-y="', 1).partition("</svg>")[0]
        path.write_text(f"{inner}</svg>", encoding="utf-8")
        size = re.search(r'width="(\d+)" height="(\d+)"', part)
        found = boxes(browser, path)
        assert size and len(found) > 8
        assert faults(found, int(size[1]), int(size[2])) == []


def test_a_fault_is_seen():
    box = {"words": "a", "x": 10, "y": 10, "width": 50, "height": 12}
    over = {**box, "words": "b", "x": 55}
    out = {**box, "words": "c", "x": 60, "y": 30}
    assert faults([box, over, out], 100, 50) == [
        "a / b", "b: 55 to 105 of 100", "c: 60 to 110 of 100"
    ]  # fmt: skip
