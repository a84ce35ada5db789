"""What the demo says at its end: both ways beside each other, and what a card would need."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from pack.nodes.denoiser.sizes import Request
from pack.nodes.fit.stages import published_models
from pack.nodes.fit.what_fits import fit
from pack.nodes.units import GIB, MIB, size
from pack.runner import graphs
from pack.runner.demo_figures import (
    Compared,
    Taken,
    columns,
    difference,
    predicted,
    predicted_chart,
)
from pack.runner.model_files import Models
from pack.runner.server_watch import Row, Watched
from PIL import Image


def png(value: int = 90, side: int = 8, spot: int | None = None) -> bytes:
    image = Image.new("RGB", (side, side), (value, value, value))
    if spot is not None:
        image.putpixel((0, 0), (spot, value, value))
    image.save(made := io.BytesIO(), "PNG")
    return made.getvalue()


def record(mib: int, *, weights: int = 0, is_at_least: bool = False) -> dict[str, Any]:
    parts = {"weights": weights * MIB, "activations": mib * MIB, "other": 7 * MIB}
    return {"state": "done", "parts_at_peak": parts, "is_at_least": is_at_least}


def taken(sampling: dict[str, Any], decode: dict[str, Any], picture: bytes) -> Taken:
    rows = [Row("KSampler", 4.2, 0, None), Row("VAEDecode", 1.5, 0, None)]
    records = {"sampling": sampling, "decode": decode}
    return Taken(Watched({}, rows, 0, 0), records, picture)


ALONE = taken(record(80), record(200), png())
OURS = taken(record(50), record(60, is_at_least=True), png(spot=91))


def line(text: str, start: str) -> list[str]:
    """The cells of a line."""
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return [cell.strip() for cell in found.split("   ") if cell.strip()]


def test_without_a_card_what_a_stage_added_is_compared():
    text = Compared("256x256, 4 steps, on the CPU", ALONE, OURS, on_card=False).text()
    assert line(text, "sampling: memory") == ["sampling: memory it adds", "80.0 MiB", "50.0 MiB"]
    decode = ["VAE decode: memory it adds", "200.0 MiB", "at least 60.0 MiB"]
    assert line(text, "VAE decode: mem") == decode
    assert line(text, "sampling: time")[1:] == ["4.2 s", "4.2 s"]
    assert "Pictures: 99.48 % of 8-bit values equal, largest difference 1." in text
    assert "varies from run to run" in text


def test_on_a_card_the_whole_peak_is_compared():
    both = (taken(record(n, weights=100), record(n), png()) for n in (80, 50))
    compared = Compared("1024x1024, 8 steps, on the card", *both, on_card=True)
    text = compared.text()
    assert line(text, "sampling: peak")[1:] == ["187.0 MiB", "157.0 MiB"]
    assert "Pictures: equal, every pixel." in text
    assert 'class="fill-weights"' in compared.chart("light")


def test_a_run_that_fails_without_our_nodes_is_said():
    compared = Compared("8x8", None, OURS, on_card=True, failed="out of memory in VAEDecode")
    text = compared.text()
    assert line(text, "VAE decode: time")[1:] == ["failed", "1.5 s"]
    assert "ComfyUI alone has failed: out of memory in VAEDecode" in text
    assert "Pictures: only one was made." in text
    assert ">failed</text>" in compared.chart()


def test_what_no_probe_could_tell_is_not_measured():
    nothing = {"state": "done", "parts_at_peak": None, "is_at_least": False}
    compared = Compared("8x8", taken(nothing, nothing, png()), OURS, on_card=False)
    assert line(compared.text(), "sampling: memory")[1:] == ["not measured", "50.0 MiB"]


def test_the_prediction_is_the_readmes():
    needs = {picture: [stage.least_bytes for _, stage in ways] for picture, ways in predicted()}
    text = Compared("8x8", ALONE, OURS, on_card=False).text()
    for picture, (alone, balance, smallest) in needs.items():
        assert smallest < balance < alone
        assert f"{alone / GIB:.2f} GiB" in line(text, picture)[1]
        assert ("too much" in line(text, picture)[1]) == (alone > 8 * GIB)
        # The figure under "least" is the least in which the run can be planned.
        side, models = int(picture.split("x")[0]), published_models()
        for budget, verdict in ((smallest, "fits"), (smallest - 1, "tight")):
            assert fit(models, Request(side, side), budget, prefer="smallest").verdict == verdict
        assert line(text, picture)[3] == size(smallest)
    bars = [bar for group in predicted_chart().groups for bar in group.bars]
    assert [bar.total_bytes for bar in bars] == [n for ways in needs.values() for n in ways]


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (png(), "equal, every pixel"),
        (png(93), "0.00 % of 8-bit values equal, largest difference 3"),
        (png(side=9), "of different sizes"),
    ],
)
def test_how_far_two_pictures_are_apart(other, told):
    assert difference(png(), other) == told


def test_one_value_that_differs_is_not_rounded_away():
    pictures = png(side=300), png(side=300, spot=91)
    told = "all but 1 of 270000 8-bit values equal, largest difference 1"
    assert difference(*pictures) == told


def test_columns_are_aligned():
    assert columns([("a", "bb"), ("ccc", "d")]) == ["a     bb", "ccc    d"]


def test_one_step_ends_at_the_latent():
    models = Models("m", "t", "v", Path())
    graph = graphs.with_probes(graphs.example_prompt(models, graphs.Picture(64, 64)), "totals")
    step = graphs.one_step(graph)
    assert step["5"]["inputs"]["steps"] == 1 and graph["5"]["inputs"]["steps"] == graphs.STEPS
    assert step[graphs.PROBES["sampling"]]["inputs"]["detail"] == "blocks"
    assert step[graphs.PROBES["decode"]]["inputs"]["value"] == ["5", 0]
    types = {node["class_type"] for node in step.values()}
    assert not {"VAEDecode", "SaveImage"} & types
