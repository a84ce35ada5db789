"""The zip that the registry gets, unpacked and loaded by the host as a custom node."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pack.tests.architecture_rules import REPO, files, is_shipped

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> list[str]:
    """The project's files without those that .comfyignore names, which is read as .gitignore is."""
    index = tmp_path_factory.mktemp("index")
    git = ["git", f"--git-dir={index}", f"--work-tree={REPO}"]
    names = [path.as_posix() for path in files()]

    def run(*args: str, given: str = "") -> list[str]:
        command = [*git, *args]
        done = subprocess.run(command, cwd=REPO, input=given, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout.split("\0")[:-1]

    run("init", "-q")
    run("update-index", "--add", "-z", "--stdin", given="\0".join(names))
    dropped = run("ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore")
    return [name for name in names if name not in dropped]


@pytest.fixture
def unpacked(published, tmp_path) -> Path:
    archive, place = tmp_path / "node.zip", tmp_path / "z-image-low-vram"
    with zipfile.ZipFile(archive, "w") as made:
        for name in published:
            made.write(REPO / name, name)
    with zipfile.ZipFile(archive) as read:
        read.extractall(place)
    return place


def test_it_is_what_the_rules_on_files_take_for_published(published):
    """A folder without a leading slash would be dropped everywhere."""
    assert published == [path.as_posix() for path in files() if is_shipped(path)]


def test_it_holds_nothing_that_is_not_for_users(published):
    folders = {name.split("/")[0] for name in published if "/" in name}
    assert folders == {"nodes", "js", "locales", "example_workflows", "docs"}
    single = {name for name in published if "/" not in name}
    texts = {"README.md", "README.zh.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"}
    assert single == {"__init__.py", "pyproject.toml", "icon.svg", *texts}


def test_the_host_loads_all_nodes_and_the_page_from_it(host, unpacked, monkeypatch):
    for name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "EXTENSION_WEB_DIRS"):
        monkeypatch.setattr(host.nodes, name, {})
    own_name = str(unpacked).replace(".", "_x_")  # what the host calls the package
    try:
        assert asyncio.run(host.nodes.load_custom_node(str(unpacked)))
        loaded = host.nodes.NODE_CLASS_MAPPINGS
        sources = {Path(sys.modules[node.__module__].__file__) for node in loaded.values()}
        (page,) = {Path(folder) for folder in host.nodes.EXTENSION_WEB_DIRS.values()}
    finally:
        for name in [name for name in sys.modules if name.startswith(own_name)]:
            del sys.modules[name]
    chinese = json.loads((unpacked / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    assert set(loaded) == set(chinese)
    assert all(source.is_relative_to(unpacked) for source in sources)
    assert page == unpacked / "js"
    for node_id in loaded:
        assert (page / "docs" / f"{node_id}.md").is_file()
        assert (page / "docs" / node_id / "zh.md").is_file()


def test_every_script_of_the_page_finds_what_it_imports(unpacked):
    scripts = list((unpacked / "js").rglob("*.js"))
    found = [
        (script, (script.parent / target).resolve())
        for script in scripts
        for target in re.findall(r'from "(\.[^"]+)"', script.read_text("utf-8"))
    ]
    ours = [(script, path) for script, path in found if path.is_relative_to(unpacked.resolve())]
    assert len(ours) > len(scripts) / 2
    assert [(script.name, path) for script, path in ours if not path.is_file()] == []
