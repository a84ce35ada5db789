"""One host inside the test process, on the CPU, with a base directory of its own.

The host reads its settings when it is first imported, and one process holds one host. So they are
made here, before any test of this folder is imported; the host itself is imported by the fixture
`host`. Without ZIMAGE_HOST_DIR every test that asks for it is skipped.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HOST_DIR = os.environ.get("ZIMAGE_HOST_DIR", "")
SMALL_FOLDER = "Z-Image-Turbo"


def _settle(host_dir: str) -> Path:
    """Puts the host on the import path and its settings in place; returns its base directory."""
    # In front, because with `python -m pytest` the working directory has a `nodes` of its own.
    sys.path.insert(0, host_dir)
    from comfy.cli_args import args  # parses no command line unless main.py asks for it

    base_dir = tempfile.mkdtemp(prefix="z-image-host-")
    atexit.register(shutil.rmtree, base_dir, ignore_errors=True)
    args.cpu = True
    args.base_directory = base_dir
    args.disable_api_nodes = True
    return Path(base_dir)


BASE_DIR = _settle(HOST_DIR) if HOST_DIR else None


class Host(NamedTuple):
    """The host's modules that tests use, and its folders."""

    base_dir: Path
    models_dir: Path
    version: str
    sd: Any
    model_management: Any
    folder_paths: Any
    nodes: Any


@pytest.fixture(scope="session")
def host() -> Host:
    if BASE_DIR is None:
        pytest.skip("needs a host: set ZIMAGE_HOST_DIR to an unpacked ComfyUI")
    import comfy.model_management
    import comfy.sd
    import comfyui_version
    import folder_paths
    import utils.extra_config  # noqa: F401 (before `nodes`, which hides `utils` in hosts up to 0.24)

    import nodes

    return Host(
        base_dir=BASE_DIR,
        models_dir=BASE_DIR / "models",
        version=comfyui_version.__version__,
        sd=comfy.sd,
        model_management=comfy.model_management,
        folder_paths=folder_paths,
        nodes=nodes,
    )


@pytest.fixture(scope="session")
def widened(host: Host) -> Iterator[None]:
    """The host recognises small widths for as long as tests run."""
    from pack.testing import widen_detection

    widen_detection.install()
    yield
    widen_detection.uninstall()


@pytest.fixture(scope="session")
def small_folder(host: Host, widened: None) -> Path:
    """A small diffusers folder; the node calls it "Z-Image-Turbo/"."""
    from pack.testing import tiny_models

    return tiny_models.write_small_folder(host.models_dir / "diffusers" / SMALL_FOLDER)


@pytest.fixture(scope="session")
def small_files(host: Host, small_folder: Path) -> dict[str, Path]:
    """The same weights as single files, where the host looks for them."""
    from pack.testing import tiny_models

    return tiny_models.write_single_files(small_folder, host.models_dir)


@pytest.fixture(autouse=True)
def _clean_host() -> Iterator[None]:
    """Each test finds the host's file lists unread and no model loaded."""
    yield
    if "folder_paths" in sys.modules:
        sys.modules["folder_paths"].filename_list_cache.clear()
    if "comfy.model_management" in sys.modules:
        sys.modules["comfy.model_management"].unload_all_models()


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Torch computes with one thread: with several, products are split by their size."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def output(host: Host, tmp_path: Path) -> Iterator[Path]:
    """The host's output folder, for one test."""
    before = host.folder_paths.get_output_directory()
    host.folder_paths.set_output_directory(str(tmp_path / "output"))
    yield tmp_path / "output"
    host.folder_paths.set_output_directory(before)
