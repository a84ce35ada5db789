"""The weights of one component (transformer, text encoder, VAE): a file or a folder of shards."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .header import Header, TensorInfo, WeightsError, pickle_sentence, read_header, unreadable

INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pkl", ".pt", ".pt2", ".pth")


@dataclass(frozen=True)
class Component:
    """Checked weights of one component; the tensors stay on disk.

    label: the name the user chose, for messages.
    tensors: what each tensor is, by name.
    file_of: the file of each tensor.
    files: every safetensors file, in order.
    config: the folder's config.json; empty where there is none.
    metadata: what the header of each file says beside the tensors.
    is_file: chosen as a single file, not as a folder.
    """

    label: str
    tensors: Mapping[str, TensorInfo]
    file_of: Mapping[str, Path]
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    metadata: tuple[Mapping[str, str], ...]
    is_file: bool


def open_file(path: Path, label: str) -> Component:
    """Opens a single weight file.

    Raises:
        WeightsError: the file is a pickle, cannot be read, is truncated or malformed.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise WeightsError(pickle_sentence(label))
    return _component(label, [read_header(path)], {}, is_file=True)


def open_folder(folder: Path, label: str) -> Component:
    """Opens a component folder as `save_pretrained` writes it: one file, or shards with an index.

    Raises:
        WeightsError: the folder is empty, a shard is missing or truncated, or the index and the
            shards disagree.
    """
    try:
        names = [p.name for p in folder.iterdir() if p.is_file() or p.is_symlink()]
    except OSError as error:
        raise WeightsError(
            f"{label} cannot be read ({error.strerror or error}): check that the folder exists"
        ) from error
    config = read_json(folder / "config.json") if "config.json" in names else {}
    if "quantization_config" in config:
        raise WeightsError(
            f"{label} holds quantised weights, which cannot be loaded from a folder: use the plain "
            "folder with weight_dtype, or a quantised single file"
        )
    # Variants ("x.fp16.safetensors") may lie beside the plain file; the plain name is the shortest.
    names.sort(key=lambda name: (len(name), name))
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    weights = [n for n in names if n.endswith(".safetensors")]
    if indexes:
        return _open_shards(folder, label, folder / indexes[0], config)
    if not weights:
        pickles = [n for n in names if n.lower().endswith(PICKLE_SUFFIXES)]
        if pickles:
            raise WeightsError(
                f"{label} holds pickle files ({pickles[0]}) and no safetensors: download the "
                "safetensors files"
            )
        raise WeightsError(f"{label} holds no .safetensors file: download the folder again")
    if any("-of-" in n for n in weights):
        raise WeightsError(
            f"{label} holds shards ({weights[0]}) but no *{INDEX_SUFFIX}: download the index too"
        )
    return _component(label, [read_header(folder / weights[0])], config)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        WeightsError: the file cannot be read or is no JSON object.
    """
    name = f"{path.parent.name}/{path.name}"
    if os.path.exists(path) and not os.path.isfile(path):  # to open a pipe would wait
        raise WeightsError(f"{name} is not a file: download it again")
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise unreadable(name, error) from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{name} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(
            f"{name} must hold a JSON object, got {type(value).__name__}: download it again"
        )
    return value


def _open_shards(folder: Path, label: str, index: Path, config: Mapping[str, Any]) -> Component:
    weight_map = read_json(index).get("weight_map", {})
    shards = weight_map.values() if isinstance(weight_map, dict) else ()
    if not shards or not all(isinstance(shard, str) for shard in shards):
        raise WeightsError(f"{label}{index.name} has no weight_map: download the index again")
    headers: dict[str, Header] = {}
    for shard in sorted(set(shards)):
        if shard in ("", "..") or Path(shard).name != shard or "\\" in shard:
            raise WeightsError(
                f"{label}{index.name} names {shard!r}, which is not a plain file name"
            )
        if not os.path.exists(folder / shard):  # Path.exists raises for a name that is too long
            raise WeightsError(
                f"{label} lacks the shard {shard}, which {index.name} names: download that shard"
            )
        headers[shard] = read_header(folder / shard)
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard].tensors:
            raise WeightsError(
                f"{label}{index.name} says that {tensor} is in {shard}, which does not hold it: "
                "index and shards are of different downloads: download the folder again"
            )
    return _component(label, headers.values(), config, weight_map=weight_map)


def _component(
    label: str,
    headers: Collection[Header],
    config: Mapping[str, Any],
    *,
    weight_map: Mapping[str, str] | None = None,
    is_file: bool = False,
) -> Component:
    holders = {
        name: header
        for header in headers
        for name in header.tensors
        # The index decides which tensors count, and which copy counts if two shards hold one.
        if weight_map is None or weight_map.get(name) == header.path.name
    }
    return Component(
        label=label,
        tensors={name: header.tensors[name] for name, header in holders.items()},
        file_of={name: header.path for name, header in holders.items()},
        files=tuple(h.path for h in headers),
        config=config,
        metadata=tuple(h.metadata for h in headers),
        is_file=is_file,
    )
