"""The project's pictures of the page: one for each workflow, sharp enough, small, not blank."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from pack.testing.example_workflows import FOLDER, NAMES
from PIL import Image, ImageChops, ImageStat

REPO = FOLDER.parent
PICTURES = REPO / "docs" / "pictures"
# Of the real page, at 100 % zoom and two pixels for each of the page's.
NODES = ("fit_to_vram.png", "vram_probe.png")
ANIMATED = ("fit_sizes.gif", "sampling.gif")
DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("js/docs/**/*.md")])
MAX_BYTES = 400 * 1024
MIN_WIDTH_PX, NODE_WIDTH_PX, THUMBNAIL_PX = 1000, 800, 512
MIN_SPREAD = 8  # standard deviation of the lightness, of 128 at most


def spread(picture: Image.Image) -> float:
    return ImageStat.Stat(picture.convert("L")).stddev[0]


@pytest.mark.parametrize("name", NAMES)
def test_each_workflow_has_a_picture_and_a_thumbnail(name):
    with Image.open(FOLDER / f"{name}.png") as picture:
        assert picture.width >= MIN_WIDTH_PX
        assert spread(picture) > MIN_SPREAD
    with Image.open(FOLDER / f"{name}.jpg") as small:
        assert small.width == THUMBNAIL_PX
        assert spread(small) > MIN_SPREAD
        shape = small.height / small.width
    assert abs(shape - picture.height / picture.width) < 0.01, "of another picture"
    assert (FOLDER / f"{name}.png").stat().st_size < MAX_BYTES


def test_there_is_no_picture_of_a_workflow_that_is_gone():
    pictures = {path.stem for kind in ("png", "jpg") for path in FOLDER.glob(f"*.{kind}")}
    assert pictures == set(NAMES)


@pytest.mark.parametrize("name", NODES)
def test_the_nodes_at_work(name):
    with Image.open(PICTURES / name) as picture:
        assert picture.width >= NODE_WIDTH_PX
        assert spread(picture) > MIN_SPREAD
    assert (PICTURES / name).stat().st_size < MAX_BYTES


@pytest.mark.parametrize("name", ANIMATED)
def test_animations_have_frames_that_differ(name):
    with Image.open(PICTURES / name) as animation:
        frames = []
        for number in range(getattr(animation, "n_frames", 1)):
            animation.seek(number)
            frames.append(animation.convert("RGB"))
        assert animation.info["loop"] == 0, "endless"
    assert len(frames) >= 4
    assert frames[0].width >= NODE_WIDTH_PX
    pairs = itertools.pairwise(frames)
    assert all(ImageChops.difference(one, two).getbbox() for one, two in pairs)
    assert min(map(spread, frames)) > MIN_SPREAD
    assert (PICTURES / name).stat().st_size < MAX_BYTES


def _named(document: Path) -> set[Path]:
    text = document.read_text("utf-8")
    found = re.findall(r"[\w./-]+\.(?:png|gif|jpe?g|webp)\b", text)
    return {document.parent / name for name in found if "/" in name and "*" not in name}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_pictures_that_a_document_names_are_there(document):
    for path in _named(document):
        if not path.exists() and (REPO / path.relative_to(document.parent)).exists():
            path = REPO / path.relative_to(document.parent)  # named by its place in the project
        with Image.open(path) as picture:
            assert spread(picture) > MIN_SPREAD, path
