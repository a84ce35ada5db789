"""Rules on the project's files: each takes a file's text and gives the lines that break it."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

REPO = Path(__file__).resolve().parent.parent
# What a subject may import besides the standard library, itself and the shared files.
SUBJECTS: dict[str, set[str]] = {
    "denoiser": {"torch"},
    "attention": {"torch"},
    "vae": {"torch"},
    "fit": set(),
    "probe": {"torch"},
    "weights": {"torch", "safetensors", "transformers"},
}
# What a folder below nodes/host/ may import besides itself, host/base and the shared files.
TWINS: dict[str, set[str]] = {
    "base": set(),
    "denoiser": {"denoiser"},
    "attention": {"attention"},
    "vae": {"vae"},
    "fit": {*SUBJECTS},
    "probe": {"probe"},
    "loader": {"weights"},
}
# Files of nodes/ itself that every subject may import.
SHARED = {"units", "cuts", "prefer", "words"}
# `python run.py plan` runs on the standard library alone, so these have no torch.
TORCH_FREE = {
    *("sizes", "cuts", "plan", "peak", "need", "cost", "choice", "budget", "families"),
    *("parallel_plan", "products", "unet_cuts", "unet_peak"),
}
PROBE_WITH_TORCH = {"operations", "tracker"}
NETWORK_AND_PROCESSES = {
    "aiohttp", "asyncore", "ftplib", "http", "httpx", "huggingface_hub", "imaplib", "poplib",
    "multiprocessing", "pty", "requests", "smtplib", "socket", "socketserver", "ssl",
    "subprocess", "telnetlib", "urllib", "urllib3", "webbrowser", "websockets", "xmlrpc",
}  # fmt: skip


def files(*suffixes: str) -> Iterator[PurePosixPath]:
    """Every file of the project, below its root; not what tools leave in hidden folders."""
    for folder, inside, names in os.walk(REPO):
        shown = [n for n in inside if n[0] != "." or n in (".ci", ".github")]
        inside[:] = sorted(set(shown) - {"__pycache__"})
        for name in sorted({*names} - {".git"}):  # a file in a worktree, with a path in it
            if not suffixes or name.endswith(suffixes):
                yield PurePosixPath(Path(folder, name).relative_to(REPO).as_posix())


def is_shipped(path: PurePosixPath) -> bool:
    """Whether .comfyignore leaves the file in the published pack."""
    lines = [line.lstrip("/") for line in (REPO / ".comfyignore").read_text().split()]
    return not any(
        f"{path}".startswith(line) if line.endswith("/") else f"{path}" == line for line in lines
    )


def read(path: PurePosixPath) -> str:
    return (REPO / path).read_text("utf-8")


def documents() -> dict[str, str]:
    """What users and contributors read, by name. Not the changelog, which tells of its time."""
    return {
        path.as_posix(): read(path)
        for path in files(".md")
        if len(path.parts) == 1 or path.parts[0] in ("docs", "js")
        if path.name != "CHANGELOG.md"
    }


def imports(source: str, path: PurePosixPath) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported; the pack's own files begin with ``pack.``."""
    package = ["pack", *path.parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_arrows(source: str, path: PurePosixPath) -> list[str]:
    """Imports against __init__ -> extension -> node files -> host/X -> {host/base, X}."""
    wrong = []
    for line, name in imports(source, path):
        top, *rest = name.split(".")
        if top == "pack":
            fine = _is_reachable(rest, path)
        else:
            fine = top in sys.stdlib_module_names or _third_party(name, path)
        if not fine:
            wrong.append(f"{path}:{line} imports {name}")
    return wrong


def _is_reachable(target: list[str], path: PurePosixPath) -> bool:
    """Whether a file may import from a module of the pack, named without ``pack``."""
    if target[:1] != ["nodes"] or len(target) < 2:
        return False
    room, inner = target[1], target[2] if len(target) > 2 else ""
    if path.parts[0] != "nodes":
        return room == "extension"
    if len(path.parts) == 2:  # a node file or the extension
        rooms = {*SUBJECTS, *SHARED, "host"}
        if path.stem == "extension":
            node_files = {p.stem for p in files(".py") if len(p.parts) == 2}
            rooms |= node_files - {"extension", "__init__"}
        return room in rooms
    if path.parts[1] != "host":
        return room in {path.parts[1], *SHARED} or (path.parts[1] == "fit" and room in SUBJECTS)
    if len(path.parts) == 3:  # nodes/host/__init__.py
        return False
    twin = path.parts[2]
    if room == "host":
        return inner in {twin, "base"} or twin == "fit"
    return room in {*TWINS[twin], *SHARED}


def _third_party(name: str, path: PurePosixPath) -> bool:
    top = name.split(".")[0]
    if len(path.parts) < 3:  # a node file, the extension or the root
        return top == "torch" or name.startswith("comfy_api.latest.")
    if path.parts[1] == "host":
        return True
    is_torch_free = path.stem in TORCH_FREE
    if path.parts[1] == "probe":
        is_torch_free = path.stem not in PROBE_WITH_TORCH
    return top in SUBJECTS[path.parts[1]] and not (is_torch_free and top == "torch")


def module_level_imports(source: str, path: PurePosixPath) -> list[str]:
    """Imports that run when the file is imported."""
    body = ast.parse(source).body
    inner = [n for n in body if not isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    nodes = [n for top in inner for n in ast.walk(top)]
    return [f"{path}:{n.lineno}" for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)]


def network_and_processes(source: str, path: PurePosixPath) -> list[str]:
    """Imports and calls that a registry's scanner flags."""
    wrong = [
        f"{path}:{line} imports {name}"
        for line, name in imports(source, path)
        if name.split(".")[0] in NETWORK_AND_PROCESSES
    ]
    for node in ast.walk(ast.parse(source)):
        text = (
            ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute | ast.Subscript) else ""
        )
        if isinstance(node, ast.Call) and re.match(
            r"(os\.(system|popen|exec\w+|spawn\w+|fork\w*|putenv|unsetenv|posix_spawn\w*)|eval|exec"
            r"|__import__|os\.environ\.(update|setdefault|pop|clear))\(",
            text,
        ):
            wrong.append(f"{path}:{node.lineno} calls {text}")
        written = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        if written and text.startswith("os.environ"):
            wrong.append(f"{path}:{node.lineno} writes {text}")
    return wrong


# A switch of torch that is set for the length of a call and can be set in no other way.
SWITCHES = {"cudnn.benchmark"}


def touches_the_host(source: str, path: PurePosixPath) -> list[str]:
    """Assignments into imported modules, swapped classes, edits of the import path."""
    tree = ast.parse(source)
    modules = {"sys.path", "sys.modules"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules |= {alias.asname or alias.name for alias in node.names}
    wrong = []
    for node in ast.walk(tree):
        text = (
            ast.unparse(node) if isinstance(node, ast.Attribute | ast.Subscript | ast.Call) else ""
        )
        if isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
            owner = (
                text.rpartition(".")[0] if isinstance(node, ast.Attribute) else text.split("[")[0]
            )
            is_switch = text in SWITCHES
            if (owner in modules and not is_switch) or text.endswith(".__class__"):
                wrong.append(f"{path}:{node.lineno} assigns {text}")
        elif isinstance(node, ast.Call):
            edits_path = re.match(r"sys\.path\.(append|insert|extend|remove)\(", text)
            if edits_path or (text[:8] == "setattr(" and ast.unparse(node.args[0]) in modules):
                wrong.append(f"{path}:{node.lineno} calls {text}")
    return wrong


_PLACES = re.compile(
    r"https?:/{2}(?!127\.0\.0\.1\b|localhost\b)"  # an address of a host that is not this machine
    r"|\b[A-Za-z0-9-]+\.(?:com|org|net|io|ai|co|dev|cn)\b(?!\.?\w|\()"  # a host's bare name
    r"|(?<![\w.~-])/(?:home|root|work|workspace|Users|mnt|opt|srv|tmp)/"  # a developer's folder
    r"|\b[A-Z]:\\{1,2}\w"
)


# Published model pages and public projects, by their full address.
_PUBLISHED = re.compile(
    r"https:/{2}huggingface\.co/[\w.-]+/[\w.-]+|https:/{2}github\.com/(?:Comfy-Org|huggingface)/[\w-]+"
)


def places(source: str, path: PurePosixPath) -> list[str]:
    """Names of internet hosts, and paths of somebody's machine.

    Texts and workflows may link to published model pages and to public projects.
    """
    if path.suffix in (".md", ".json"):
        source = _PUBLISHED.sub("", source)
    if path.suffix in (".svg", ".py"):
        source = re.sub(r'xmlns(:\w+)?="[^"]*"', "", source)  # a name that only looks like a place
    found = [
        (n, m) for n, line in enumerate(source.splitlines(), 1) for m in _PLACES.finditer(line)
    ]
    return [f"{path}:{number} names {match.group()}" for number, match in found]


def js_network(source: str, path: PurePosixPath) -> list[str]:
    """Ways out of the page other than the host's own `api`."""
    calls = (
        r"(?<![\w.])(fetch|eval|importScripts)\s*\(|\bnew (WebSocket|XMLHttpRequest|EventSource)\b"
    )
    return [f"{path}: {match.group()}" for match in re.finditer(calls, source)]
