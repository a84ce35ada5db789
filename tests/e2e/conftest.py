"""A real server with small random models, shared by the end-to-end tests.

Without ZIMAGE_HOST_DIR every test that asks for the host is skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pack.runner.folder_links import link_folder
from pack.runner.live_host import REPO, LiveHost

if TYPE_CHECKING:
    from pack.tests.e2e.page import ComfyPage
    from playwright.sync_api import Browser

SMALL_FOLDER = "Z-Image-Turbo"
TIMEOUT_S = 120


def tree_sums(folder: Path) -> dict[str, str]:
    """The sha256 of every file below a folder, by its name; not of bytecode."""
    paths = (path for path in sorted(folder.rglob("*")) if "__pycache__" not in path.parts)
    files = [path for path in paths if path.is_file()]
    sums = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return sums


def forget(server: LiveHost) -> None:
    """Makes the host drop its models and its cached outputs."""
    server.post_json("/free", {"unload_models": True, "free_memory": True})
    # The host does so between two prompts, so one must end before the next can rely on it.
    size = {"width": 16, "height": 16, "batch_size": 1, "color": 0}
    save = {"images": ["1", 0], "filename_prefix": uuid.uuid4().hex}
    run_between = {
        "1": {"class_type": "EmptyImage", "inputs": size},
        "2": {"class_type": "SaveImage", "inputs": save},
    }
    server.wait(server.queue(run_between), TIMEOUT_S)


@pytest.fixture(scope="session")
def host_dir() -> Iterator[Path]:
    """The host's folder; fails at the end when anything has written into it."""
    folder = os.environ.get("ZIMAGE_HOST_DIR")
    if not folder:
        pytest.skip("needs a host: set ZIMAGE_HOST_DIR to an unpacked ComfyUI")
    before = tree_sums(Path(folder))
    yield Path(folder)
    assert tree_sums(Path(folder)) == before, "the host's own folder was changed"


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the same small weights as a diffusers folder and as single files."""
    from pack.testing import tiny_models

    models_dir = tmp_path_factory.mktemp("models")
    folder = tiny_models.write_small_folder(models_dir / "diffusers" / SMALL_FOLDER)
    tiny_models.write_single_files(folder, models_dir)
    return models_dir


@pytest.fixture(scope="session")
def new_base(tmp_path_factory: pytest.TempPathFactory, small_models: Path):
    """Makes a base directory whose server sees the small models and accepts their widths."""

    def make(name: str) -> Path:
        base_dir = tmp_path_factory.mktemp(name)
        link_folder(small_models, base_dir / "models")
        (base_dir / "custom_nodes").mkdir()
        shutil.copy(REPO / "testing" / "widen_detection.py", base_dir / "custom_nodes")
        return base_dir

    return make


@pytest.fixture(scope="session")
def server(host_dir: Path, new_base) -> Iterator[LiveHost]:
    """The shared server, with the pack and the small models."""
    with LiveHost(host_dir, new_base("shared")) as live:
        yield live


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A Chromium without a window; only the files that ask for it need Playwright.

    Closed after each file: while Playwright is open, no other test can start an event loop.
    """
    from pack.tests.e2e.page import find_chromium, launch
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    if chromium is None:
        pytest.skip("needs Chromium: install one, or set ZIMAGE_CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = launch(playwright, chromium)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared_pages(browser: Browser, server: LiveHost) -> Iterator[dict[tuple[bool, str], ComfyPage]]:
    """Pages by their settings: opening one takes six seconds of a core, keeping it hardly any."""
    pages: dict[tuple[bool, str], ComfyPage] = {}
    yield pages
    for page in pages.values():
        page.close()


@pytest.fixture
def open_page(
    browser: Browser, server: LiveHost, shared_pages: dict[tuple[bool, str], ComfyPage]
) -> Iterator[Callable[..., ComfyPage]]:
    """Opens a page, or gives the one that an earlier test has opened with these settings.

    With `fresh` it is a new one, and is closed when the test ends.
    """
    from pack.tests.e2e.page import ComfyPage

    opened: list[ComfyPage] = []

    def open_one(*, nodes_2: bool, locale: str = "en", fresh: bool = False) -> ComfyPage:
        key = (nodes_2, locale)
        if fresh or key not in shared_pages:
            page = ComfyPage(browser, server, nodes_2=nodes_2, locale=locale)
            if fresh:
                opened.append(page)
                return page
            shared_pages[key] = page
        shared_pages[key].faults.clear()
        return shared_pages[key]

    yield open_one
    for page in opened:
        page.close()


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """Where screenshots are kept."""
    return Path(os.environ.get("ZIMAGE_ARTIFACTS") or tmp_path)
