"""The README's chart of memory: from the plan, in two languages, light and dark."""
# ruff: noqa: RUF001 (the sign between the sides of a picture)

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pack.benchmarks import rows
from pack.benchmarks import vram_chart as script
from pack.benchmarks.card.tables import HOST
from pack.benchmarks.shown import vram_chart as shown
from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.stages import published_models
from pack.nodes.fit.what_fits import fit
from pack.nodes.units import GIB
from pack.tests.benchmarks.card_rows import FIT, OURS, fill, whole

STORED = rows.read(rows.REPO / "benchmarks" / "results" / "vram_chart.jsonl")
PICTURES = rows.REPO / "docs" / "pictures"
COLOUR = re.compile(r"#[0-9a-f]{6}")


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return shown.charts(STORED)


def test_the_stored_rows_are_what_the_plan_says_now():
    assert script.rows() == STORED


def test_the_stored_pictures_are_those_of_the_rows(made):
    stored = {path.name: path.read_text("utf-8") for path in PICTURES.glob("vram_*.svg")}
    assert stored == made


def test_light_and_dark_differ_in_colours_alone(made):
    for suffix in shown.LANGUAGES:
        light, dark = (made[f"vram{suffix}_{theme}.svg"] for theme in shown.THEMES)
        assert light != dark
        assert COLOUR.sub("", light) == COLOUR.sub("", dark)


def test_the_title_names_the_largest_pictures_on_8_gib(made):
    models, (card,) = published_models(), [row for row in STORED if row.get("card_gib") == 8]
    sides = card["balance_largest_px"], card["alone_largest_px"]
    title = "<title>8 GiB of free VRAM: {0}×{0} with this pack, {1}×{1} without</title>"
    assert title.format(*sides) in made["vram_light.svg"]
    assert all(f"{side}×{side}" in made["vram_zh_dark.svg"] for side in sides)
    # Fit to VRAM plans that picture with its default setting, and not the next larger one.
    for side, setting in ((sides[0], "Lean VAE balance"), (sides[0] + 16, "Lean VAE smallest")):
        plan = fit(models, Request(side, side), 8 * GIB)
        assert plan.verdict == "fits"
        assert plan.stages[-1].setting == setting
    least = [script.least_bytes(models, sides[1] + more, "alone") for more in (0, 16)]
    assert least[0] <= 8 * GIB < least[1]


def test_its_figures_are_the_rows(made):
    """They were once typed: 8 GiB in the Chinese title, 256 tokens and bfloat16 in both."""
    others = [{**row, "text_tokens": 77, "dtype": "float16"} for row in STORED]
    for suffix, tokens in (("", "77 text tokens"), ("_zh", "77 个文本 token")):
        text = shown.charts(others)[f"vram{suffix}_light.svg"]
        assert tokens in text and "float16" in text and "bfloat16" not in text
    for words in shown.LANGUAGES.values():
        assert "{gib}" in words.title and not re.search(r"\d", words.title)
    assert re.search("[A-Za-z][\u4e00-\u9fff]", made["vram_zh_light.svg"]) is None


def test_says_that_nothing_was_measured_until_a_card_was(made, tmp_path: Path):
    assert "not measured on a card" in made["vram_light.svg"]
    assert "未在显卡上实测" in made["vram_zh_light.svg"]
    runs = [
        whole(FIT, gib=3.8, s=9.0, card_gib=4),
        whole(HOST, gib=None, s=None, card_gib=4, survived=False, error="out of memory"),
        whole(FIT, gib=5.0, s=9.0, card_gib=6, case="2048x2048x1"),
        whole(HOST, gib=5.9, s=9.0, card_gib=6, case="2048x2048x1", note="decoded in tiles"),
        whole(FIT, gib=24.0, s=4.0),
        whole(OURS, gib=3.0, s=4.0, card_gib=4),
        whole(FIT, gib=3.0, s=4.0, card_gib=4, case="512x512x4"),
    ]
    found = script.measured(fill(tmp_path, runs))
    assert [(one["on_gib"], one["measured_px"], one["way"], one["is_whole"]) for one in found] == [
        (4, 1024, "balance", True), (4, 1024, "alone", False),
        (6, 2048, "balance", True), (6, 2048, "alone", False),
    ]  # fmt: skip
    with_points = shown.charts([*STORED, *found])["vram_light.svg"]
    assert "whole runs on a Card A" in with_points
    assert "not measured" not in with_points
    assert [with_points.count(tag) - made["vram_light.svg"].count(tag)
            for tag in ("<circle", "<line")] == [2, 4]  # fmt: skip


def test_a_line_ends_where_it_leaves_the_chart():
    scale = shown.Scale(512, 4608)
    sides = [row for row in STORED if "side_px" in row]
    points = scale.curve(sides, "alone_least_bytes")
    assert points[-1][1] == scale.top < points[-2][1]
    assert scale.curve(sides, "balance_least_bytes")[-1][0] == scale.right
