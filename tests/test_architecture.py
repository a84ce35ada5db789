"""The layout of the pack: who imports whom, and what no file may contain.

What each rule refuses is shown at the end, with lines made up for it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import PurePosixPath

import pytest
from pack.tests.architecture_rules import (
    REPO,
    SUBJECTS,
    TWINS,
    files,
    is_shipped,
    js_network,
    module_level_imports,
    network_and_processes,
    places,
    read,
    touches_the_host,
    wrong_arrows,
)

Rule = Callable[[str, PurePosixPath], list[str]]
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "comfy_aimdo", "folder_paths", "server")
PYTHON = [p for p in files(".py") if is_shipped(p)]
PICTURES = (".png", ".webp", ".jpg", ".gif")
TEXTS = [p for p in files() if p.name != "LICENSE" and p.suffix not in PICTURES]


def test_the_files_are_found():
    """An empty list would let every rule pass."""
    names = {path.as_posix() for path in PYTHON}
    assert names >= {"__init__.py", "nodes/__init__.py", "nodes/load_model.py"}
    assert names >= {"nodes/weights/header.py", "nodes/host/loader/load.py", "nodes/extension.py"}
    assert not any(
        name.startswith(("tests/", "testing/", "runner/", "benchmarks/", ".")) for name in names
    )
    folders = {p.parts[1] for p in PYTHON if len(p.parts) == 3 and p.parts[0] == "nodes"}
    twins = {p.parts[2] for p in PYTHON if len(p.parts) == 4 and p.parts[1] == "host"}
    assert (folders, twins) == ({*SUBJECTS, "host"}, {*TWINS})
    assert {"README.md", "pyproject.toml", "run.py", "tests/conftest.py"} & {str(p) for p in TEXTS}


@pytest.mark.parametrize(
    ("rule", "paths"),
    [
        (wrong_arrows, PYTHON),
        (network_and_processes, PYTHON),
        (touches_the_host, PYTHON),
        (js_network, [p for p in files(".js", ".mjs") if is_shipped(p)]),
        (places, TEXTS),
    ],
)
def test_no_file_breaks_the_rule(rule: Rule, paths: list[PurePosixPath]):
    assert [wrong for path in paths for wrong in rule(read(path), path)] == []


def test_the_root_imports_nothing_at_module_level():
    path = PurePosixPath("__init__.py")
    assert module_level_imports(read(path), path) == []


def test_nodes_init_is_a_docstring_for_ever():
    body = ast.parse(read(PurePosixPath("nodes/__init__.py"))).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


_FRESH = """
import importlib, importlib.abc, pathlib, sys, types
root, blocked = pathlib.Path(sys.argv[1]), set(sys.argv[2].split(","))

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError("the host is not here: " + name)

sys.meta_path.insert(0, Blocker())
sys.modules["pack"] = pack = types.ModuleType("pack")
pack.__path__ = [str(root)]
for room in sys.argv[3:]:
    for file in sorted((root / "nodes" / room).glob("*.py")):
        name = f"pack.nodes.{room}.{file.stem}".replace("/", ".")
        importlib.import_module(name.removesuffix(".__init__"))
        print(f"{room}/{file.name}")
"""


def fresh_python(*rooms: str) -> subprocess.CompletedProcess[str]:
    """Imports every file of the rooms in a Python that has no host and no path to the repo."""
    command = [sys.executable, "-I", "-c", _FRESH, str(REPO), ",".join(HOST_MODULES), *rooms]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_subjects_are_imported_where_there_is_no_host():
    rooms = tuple(SUBJECTS)
    done = fresh_python(*rooms)
    assert done.returncode == 0, done.stderr
    wanted = {f"{room}/{p.name}" for room in rooms for p in (REPO / "nodes" / room).glob("*.py")}
    assert set(done.stdout.split()) == wanted


def test_the_host_room_is_not():
    """Shows that the Python above has no host."""
    done = fresh_python("host/base")
    assert done.returncode != 0
    assert "the host is not here" in done.stderr


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_arrows, "nodes/weights/x.py", "import comfy.sd"),
        (wrong_arrows, "nodes/weights/x.py", "def f():\n    from ..host.loader import load"),
        (wrong_arrows, "nodes/weights/x.py", "from pack.nodes.denoiser import plan"),
        (wrong_arrows, "nodes/weights/x.py", "from .. import load_model"),
        (wrong_arrows, "nodes/vae/x.py", "from ..denoiser.cuts import DenoiserPlan"),
        (wrong_arrows, "nodes/vae/x.py", "import safetensors"),
        (wrong_arrows, "nodes/vae/plan.py", "import torch"),
        (wrong_arrows, "nodes/fit/x.py", "import torch"),
        (wrong_arrows, "nodes/fit/x.py", "from ..host.fit import budget"),
        (wrong_arrows, "nodes/probe/record.py", "import torch"),
        (wrong_arrows, "nodes/probe/tracker.py", "import numpy"),
        (wrong_arrows, "nodes/host/vae/x.py", "from ...weights import header"),
        (wrong_arrows, "nodes/host/vae/x.py", "from ..denoiser import block"),
        (wrong_arrows, "nodes/host/base/x.py", "from ..vae import forward"),
        (wrong_arrows, "nodes/host/base/x.py", "from ...vae import plan"),
        (wrong_arrows, "nodes/host/vae/x.py", "from ...load_model import LoadZImageTurbo"),
        (wrong_arrows, "nodes/load_model.py", "import comfy.utils"),
        (wrong_arrows, "nodes/load_model.py", "import folder_paths"),
        (wrong_arrows, "nodes/load_model.py", "from .extension import ZImageLowVRAM"),
        (wrong_arrows, "nodes/lean_vae.py", "from .load_model import LoadZImageTurbo"),
        (wrong_arrows, "__init__.py", "from .nodes.load_model import LoadZImageTurbo"),
        (module_level_imports, "__init__.py", "import os"),
        (module_level_imports, "__init__.py", "if True:\n    from .nodes import extension"),
        (network_and_processes, "nodes/x.py", "import subprocess"),
        (network_and_processes, "nodes/x.py", "def f():\n    from urllib.request import urlopen"),
        (network_and_processes, "nodes/x.py", "import os\nos.system('x')"),
        (network_and_processes, "nodes/x.py", "import os\nos.environ['A'] = '1'"),
        (network_and_processes, "nodes/x.py", "import os\ndel os.environ['A']"),
        (network_and_processes, "nodes/x.py", "import os\nos.environ.setdefault('A', '1')"),
        (network_and_processes, "nodes/x.py", "eval('1')"),
        (touches_the_host, "nodes/host/x.py", "import comfy.ops\ncomfy.ops.cast = f"),
        (touches_the_host, "nodes/host/x.py", "import comfy.ops as ops\nops.cast = f"),
        (touches_the_host, "nodes/host/x.py", "from comfy import ops\nsetattr(ops, 'cast', f)"),
        (touches_the_host, "nodes/host/x.py", "model.__class__ = Other"),
        (touches_the_host, "nodes/host/x.py", "import sys\nsys.path.insert(0, 'x')"),
        (touches_the_host, "nodes/host/x.py", "import sys\nsys.modules['x'] = 1"),
        (places, "README.md", "see https:" + "//example.invalid"),
        (places, "README.md", "see example." + "com for more"),
        (places, "README.md", "see huggingface.c" + "o/a/b"),
        (places, "x.py", "path = '/ho" + "me/me/models'"),
        (places, "x.py", "path = 'C:" + "\\\\models'"),
        (js_network, "js/x.js", "const r = await fetch('/x')"),
        (js_network, "js/x.js", "new WebSocket(url)"),
    ],
)
def test_what_the_rules_refuse(rule, path, source):
    assert len(rule(source, PurePosixPath(path))) == 1


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (wrong_arrows, "nodes/weights/x.py", "from .header import x\nimport json, torch.nn"),
        (wrong_arrows, "nodes/probe/tracker.py", "from torch import nn"),
        (
            wrong_arrows,
            "nodes/fit/x.py",
            "from ..vae.plan import VaePlan\nfrom ..units import size",
        ),
        (
            wrong_arrows,
            "nodes/host/fit/x.py",
            "from ..denoiser import block\nfrom ...vae import plan",
        ),
        (wrong_arrows, "nodes/host/vae/x.py", "from ...vae import plan\nfrom ..base import fetch"),
        (wrong_arrows, "nodes/host/base/x.py", "import comfy.sd\nfrom . import page\nimport numpy"),
        (
            wrong_arrows,
            "nodes/load_model.py",
            "from comfy_api.latest import io\nfrom .host import x",
        ),
        (wrong_arrows, "nodes/extension.py", "from .load_model import LoadZImageTurbo"),
        (wrong_arrows, "__init__.py", "def f():\n    from .nodes.extension import X"),
        (module_level_imports, "__init__.py", "async def f():\n    import os"),
        (network_and_processes, "nodes/x.py", "import os\nx = os.environ['A']\nre.compile('x')"),
        (touches_the_host, "nodes/host/x.py", "import comfy\nself.patcher.init = f\nx = comfy.sd"),
        (places, "x.py", "url = f'http:" + "//127.0.0.1:{port}'\nio.Combo.Input()\n~/models/x"),
        (places, "x.svg", '<svg xmlns="http:' + "//www.example.o" + 'rg/svg">'),
        (places, "x.py", "head = '<svg xmlns=\"http:" + "//www.example.o" + "rg/svg\">'"),
        (
            places,
            "README.md",
            "[b](https:" + "//huggingface.c" + "o/a/b/resolve/main/c.safetensors)",
        ),
        (js_network, "js/x.js", "await api.fetchApi('/x'); await fetchX(1)"),
    ],
)
def test_what_the_rules_accept(rule, path, source):
    assert rule(source, PurePosixPath(path)) == []


def test_only_texts_and_workflows_link_to_published_pages():
    link = "https:" + "//huggingface.c" + "o/a/b"
    assert places(link, PurePosixPath("x.md")) == places(link, PurePosixPath("x.json")) == []
    assert places(link, PurePosixPath("x.py")) != []
    assert places(link.replace("/a/b", ""), PurePosixPath("x.md")) != []
