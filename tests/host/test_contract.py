"""contract.json lists every name of ComfyUI that the pack touches, by the oldest version with it.

The first file to run when ComfyUI moves: a name that is gone fails here by itself.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import functools
import importlib
import inspect
import json
import logging
import re
import textwrap
import types
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from aiohttp import web
from PIL import ImageDraw
from torch import nn

HERE = Path(__file__).resolve().parent
NODES = HERE.parent.parent / "nodes"
# By version, and by module or class: names.
CONTRACT: dict[str, dict[str, list[str]]] = json.loads((HERE / "contract.json").read_text("utf-8"))
ROOTS = ("comfy", "folder_paths", "server")  # of the host's modules; comfy_api and others as well
# What attributes are of that neither the pack nor the host defines.
OTHERS: tuple[Any, ...] = (
    *(object, type, str, bytes, int, float, list, dict, set, tuple, BaseException, OSError, Path),
    *(types.FunctionType, types.CodeType, types.TracebackType, types.FrameType, inspect.Signature),
    *(logging.Logger, asyncio.AbstractEventLoop, asyncio.Task, functools.partial),
    *(torch.Tensor, torch.Size, torch.device, torch.dtype, torch.finfo, torch.UntypedStorage),
    *(nn.Linear(1, 1), nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1), nn.LayerNorm(1), nn.Dropout()),
    *(nn.Upsample(), ImageDraw.ImageDraw, psutil.Process, inspect.ClosureVars, re.Pattern),
    *(psutil.virtual_memory(), psutil.Process().memory_info(), contextlib.ExitStack),
    *(torch.cuda, torch.accelerator, web.Request, web.RouteTableDef),
)
# Scopes of which a name is neither a module's nor a class's.
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)
# psutil on Windows, newer torch, torch with a card; torch's GELU, inspect.
ELSEWHERE = {
    *("peak_wset", "empty_host_cache", "multi_processor_count", "approximate", "arguments"),
    "kwargs",
}
# What the pack asks for by a string, other than in `getattr` and `hasattr`.
IN_STRINGS = {
    *("ON_CLONE", "ON_DEEPCLONE_MULTIGPU", "__ming_image__", "optimized_attention", "output"),
    *("weight_comfy_model_dtype", "forward_comfy_cast_weights"),
    *("input_scale", "pre_quant_scale", "quantize_input", "rms_rope", "dim", "head_dim"),
    *("layer_id", "layers", "decoder", "encoder", "memory_used_decode", "memory_used_encode"),
    *("attention_basic", "attention_comfy_kitchen_int8", "attention_flash", "attention_pytorch"),
    *("attention_sage", "attention3_sage", "attention_split", "attention_sub_quad"),
    *("attention_xformers", "ZImageControlPatch", "encoded_image", "encoded_image_size"),
}


class Touched(NamedTuple):
    """What a file touches.

    of_host: dotted names of the host's modules and what is in them.
    attributes: names of attributes of other objects.
    strings: whatever stands in one.
    """

    of_host: set[str]
    attributes: set[str]
    strings: set[str]


def versions() -> list[str]:
    return sorted(CONTRACT, key=_numbers)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def names_since(version: str) -> list[str]:
    return [
        f"{owner}.{name}".lstrip(".")
        for owner, names in CONTRACT[version].items()
        for name in names
    ]


def _is_hosts(module: str) -> bool:
    return module.startswith(ROOTS)


def _chain(node: ast.AST) -> list[str]:
    """The names of `a.b.c`; empty where it does not begin with a name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each imported name and what it stands for; relative imports aside."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.split(".")[0]
                yield alias.asname or name, name
                yield alias.name, alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def touched(source: str) -> Touched:
    """What a source touches, `getattr` and `hasattr` of a constant name included."""
    tree = ast.parse(source)
    imports = dict(_imports(tree))
    found = Touched({name for name in imports.values() if _is_hosts(name)}, set(), set())
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        chain: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.strings.add(node.value)
        elif isinstance(node, ast.Attribute) and node not in inner:
            chain = _chain(node)
            if not chain or chain[0] not in imports:
                found.attributes.add(node.attr)
                continue
            inner.update(part for part in ast.walk(node) if isinstance(part, ast.Attribute))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            of, name = node.args[:2]
            if not isinstance(name, ast.Constant):
                continue
            chain = [*_chain(of), str(name.value)]
            if chain[0] not in imports:
                found.attributes.add(chain[-1])
                continue
        if chain and _is_hosts(imports[chain[0]]):
            dunder = next((i for i, part in enumerate(chain) if part[:2] == "__"), len(chain))
            found.of_host.add(".".join([imports[chain[0]], *chain[1:dunder]]))
    # `instance` is the one server; what it has is said of its class.
    of_host = {name.replace("PromptServer.instance.", "PromptServer.") for name in found.of_host}
    return found._replace(of_host=of_host)


def _of_the_pack(tree: ast.AST) -> Iterator[str]:
    """Names that the pack's own modules, classes and objects have."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.Module | ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.Assign | ast.AnnAssign):
                    targets = part.targets if isinstance(part, ast.Assign) else [part.target]
                    named = (n for target in targets for n in ast.walk(target))
                    yield from (n.id for n in named if isinstance(n, ast.Name))
        is_stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_stored and _chain(node)[:1] in (["self"], ["ours"]):
            yield node.attr


@functools.cache
def touched_by_the_pack() -> Touched:
    trees = [ast.parse(path.read_text("utf-8")) for path in NODES.rglob("*.py")]
    known = {name for tree in trees for name in _of_the_pack(tree)}
    known |= ELSEWHERE.union(*(dir(other) for other in OTHERS))
    found = Touched(set(), set(), set())
    for path in (*NODES.glob("*.py"), *(NODES / "host").rglob("*.py")):
        for every, of_file in zip(found, touched(path.read_text("utf-8")), strict=True):
            every |= of_file
    is_new = (name for name in found.attributes - known if not name.startswith("__"))
    return found._replace(attributes=set(is_new))


def _names(node: ast.AST) -> Iterator[str]:
    """What a module or a class assigns to outside its functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        if not isinstance(child, SCOPES):
            yield from _names(child)


def _chains(tree: ast.AST) -> Iterator[list[str]]:
    """The names of each `a.b.c` that is assigned to; buffers are of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield _chain(node)
        elif isinstance(node, ast.Call) and _chain(node.func) == ["self", "register_buffer"]:
            named = (a.value for a in node.args[:1] if isinstance(a, ast.Constant))
            yield from (["self", str(name)] for name in named)


@functools.cache
def _assigned(owner: Any) -> frozenset[str]:
    """What a module has on some machines, or a class and its parents give their objects.

    `part.name` stands for what these give `part`: an attribute or a variable of theirs.
    """
    found: set[str] = set()
    for part in [owner] if inspect.ismodule(owner) else inspect.getmro(owner):
        if not _is_hosts(part.__name__ if inspect.ismodule(part) else part.__module__):
            continue
        tree: ast.AST = ast.parse(textwrap.dedent(inspect.getsource(part)))
        own: set[str] = set()
        if isinstance(part, type):
            tree, own = next(ast.iter_child_nodes(tree)), {"self", part.__name__}
        found.update(_names(tree))
        found.update(".".join(c[1:] if c[0] in own else c) for c in _chains(tree) if c)
    return frozenset(found)


def _has(owner: Any, name: str) -> bool:
    if inspect.isfunction(owner):
        code = owner.__code__
        return name in {*code.co_names, *code.co_varnames, *code.co_cellvars}
    if inspect.isclass(owner) or getattr(owner, "__file__", None):
        return name in _assigned(owner)
    return False


def exists(name: str) -> bool:
    """Whether the host has a name.

    Of a module, of a class or the objects of a class, of a mapping's keys, or in a function's code.
    """
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for at, part in enumerate(parts[count:], count):
            if isinstance(found, Mapping | Set):
                if part not in found:
                    return False
                found = found[part] if isinstance(found, Mapping) else None
            elif hasattr(found, part):
                found = getattr(found, part)
            else:
                return _has(found, ".".join(parts[at:]))
        return True
    return False


@pytest.mark.parametrize("version", versions())
def test_every_name_is_there_since_its_version(host, version):
    if _numbers(host.version) < _numbers(version):
        pytest.skip(f"ComfyUI {host.version} is older than {version}")
    missing = [name for name in names_since(version) if not exists(name)]
    assert not missing, f"ComfyUI {host.version} lacks what the pack touches: {missing}"


def test_every_name_that_the_pack_touches_is_listed_and_no_other():
    listed = {name for version in CONTRACT for name in names_since(version)}
    names = touched_by_the_pack()
    last = {name.rpartition(".")[2] for name in listed}
    of_objects = {name.rpartition(".")[2] for name in listed - names.of_host} - IN_STRINGS
    assert names.of_host - listed == set(), "add to contract.json, under the oldest version"
    assert names.attributes - last == set(), "add to contract.json, each under its class"
    assert of_objects - names.attributes == set(), "nothing touches these names of contract.json"
    assert IN_STRINGS - last == set(), "add to contract.json, each under its owner"
    assert IN_STRINGS - names.strings == set(), "no such string: take it out of contract.json too"


def test_a_name_that_is_not_there_is_missed(host):
    assert exists("comfy.model_patcher.ModelPatcher.object_patches")
    for name in (
        "comfy.no_module",
        "comfy.ops.no_name",
        "comfy.model_patcher.ModelPatcher.nothing",
        "comfy.model_patcher.ModelPatcher.k",  # variables of functions
        "comfy.sd.p",
        "comfy.model_patcher.ModelPatcherDynamic._v",  # of another object
        "comfy.model_patcher.ModelPatcher.clone.nothing",
        "comfy.quant_ops.QUANT_ALGOS.nvfp4.nothing",
        "comfy.quant_ops.QUANT_ALGOS.nvfp4.parameters.nothing",
    ):
        assert not exists(name)


def test_what_a_source_touches():
    seen = touched(
        "import comfy.ops as ops\nfrom comfy import sd\nimport torch\n"
        "ops.cast(x).weight; sd.VAE.decode.__code__.co_names; torch.cuda.no\n"
        "getattr(ops, 'FLAG', 1); hasattr(y, 'mark'); y.part.whole\n"
    )
    assert seen.of_host == {"comfy.ops", "comfy.sd", "comfy.ops.cast", "comfy.ops.FLAG",
                            "comfy.sd.VAE.decode"}  # fmt: skip
    assert seen.attributes >= {"weight", "mark", "part", "whole"} and "no" not in seen.attributes
