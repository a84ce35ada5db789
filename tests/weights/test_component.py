"""A component is one file, or a folder of shards whose index and files agree."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from pack.nodes.weights.component import (
    PICKLE_SUFFIXES,
    Component,
    open_file,
    open_folder,
    read_json,
)
from pack.nodes.weights.header import WeightsError
from pack.testing.fake_files import write_file, write_index, write_shards

LABEL = "M/part/"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards that hold a, b and c, and their index."""
    return write_shards(tmp_path / "part", [{"a": (2,), "b": (3, 4)}, {"c": (5,)}])


def refusal(folder: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_folder(folder, LABEL)
    message = str(caught.value)
    assert message.isprintable()
    return message


def nbytes_of(component: Component) -> int:
    return sum(info.nbytes for info in component.tensors.values())


def test_single_file(tmp_path):
    path = write_file(tmp_path / "x.safetensors", {"a": (2, 3)}, metadata={"format": "pt"})
    found = open_file(path, "sub/x.safetensors")
    assert found.label == "sub/x.safetensors"
    assert found.tensors["a"].shape == (2, 3)
    assert found.file_of == {"a": path}
    assert found.files == (path,)
    assert found.config == {}
    assert found.is_file
    assert nbytes_of(found) == 24


@pytest.mark.parametrize("suffix", [*PICKLE_SUFFIXES, ".CKPT"])
def test_a_pickle_is_refused_by_its_suffix_before_it_is_opened(tmp_path, suffix):
    with pytest.raises(WeightsError) as caught:
        open_file(tmp_path / f"x{suffix}", f"x{suffix}")
    assert str(caught.value) == (
        f"x{suffix} is a pickle file, which can run code when it is opened: use a .safetensors file"
    )


def test_shards(folder):
    (folder / "config.json").write_text('{"dim": 8}')
    found = open_folder(folder, LABEL)
    assert found.label == LABEL
    assert set(found.tensors) == {"a", "b", "c"}
    assert found.file_of["b"] == folder / FIRST
    assert found.file_of["c"] == folder / SECOND
    assert found.files == (folder / FIRST, folder / SECOND)
    assert found.config == {"dim": 8}
    assert not found.is_file
    assert nbytes_of(found) == 4 * (2 + 12 + 5)


def test_shards_through_links(folder, tmp_path):
    """Download caches keep the files elsewhere, under other names."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (linked / path.name).symlink_to(path.rename(tmp_path / f"blob{number}"))
    assert set(open_folder(linked, LABEL).tensors) == {"a", "b", "c"}


def test_folder_with_one_file(tmp_path):
    write_file(tmp_path / "model.safetensors", {"a": (1,)}, metadata={"format": "pt"})
    found = open_folder(tmp_path, LABEL)
    assert found.files == (tmp_path / "model.safetensors",)
    assert not found.is_file


def test_the_plain_file_is_taken_before_its_variants(tmp_path):
    write_file(tmp_path / "model.safetensors", {"plain": (1,)})
    write_file(tmp_path / "model.fp16.safetensors", {"fp16": (1,)})
    assert set(open_folder(tmp_path, LABEL).tensors) == {"plain"}


def test_the_plain_index_is_taken_before_its_variants(folder):
    name = "model.fp16-00001-of-00001.safetensors"
    write_file(folder / name, {"fp16": (1,)})
    index = json.dumps({"weight_map": {"fp16": name}})
    (folder / "model.safetensors.index.fp16.json").write_text(index)
    (folder / "model.fp16.safetensors.index.json").write_text(index)
    assert set(open_folder(folder, LABEL).tensors) == {"a", "b", "c"}


def test_the_index_decides_which_tensors_are_meant(folder):
    """A shard may hold more than the index names."""
    write_index(folder, {"a": FIRST, "c": SECOND})
    assert set(open_folder(folder, LABEL).tensors) == {"a", "c"}


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_the_index_decides_between_two_copies(folder, named):
    """Bug: the last shard won, whatever the index said."""
    write_file(folder / FIRST, {"a": (2,)})
    write_file(folder / SECOND, {"c": (5,), "a": (7,)})
    write_index(folder, {"a": named, "c": SECOND})
    found = open_folder(folder, LABEL)
    assert found.file_of["a"] == folder / named
    assert found.tensors["a"].shape == ((2,) if named == FIRST else (7,))


def test_missing_shard(folder):
    (folder / SECOND).unlink()
    assert refusal(folder) == (
        f"{LABEL} lacks the shard {SECOND}, which {INDEX} names: download that shard"
    )


def test_shard_that_is_a_dangling_link(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to("gone")
    assert refusal(folder).startswith(f"{LABEL} lacks the shard {FIRST}, ")


def test_truncated_shard(folder):
    whole = (folder / SECOND).stat().st_size
    os.truncate(folder / SECOND, whole - 4)
    assert refusal(folder) == (
        f"{SECOND} is truncated: its header describes {whole} bytes, the file has {whole - 4} "
        "bytes: download it again"
    )


def test_pickled_shard(folder):
    torch.save({"c": torch.zeros(5)}, folder / SECOND)
    assert refusal(folder).startswith(f"{SECOND} is a pickle file, ")


def test_index_that_names_a_tensor_no_shard_has(folder):
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    assert refusal(folder) == (
        f"{LABEL}{INDEX} says that d is in {SECOND}, which does not hold it: index and shards "
        "are of different downloads: download the folder again"
    )


def test_index_that_names_the_wrong_shard(folder):
    write_index(folder, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert refusal(folder).startswith(f"{LABEL}{INDEX} says that b is in {SECOND}, ")


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 1}, {"a": None}], ids=repr)
def test_index_without_a_weight_map(folder, weight_map):
    write_index(folder, weight_map)
    assert refusal(folder) == f"{LABEL}{INDEX} has no weight_map: download the index again"


# Whatever lies outside the folder is none of the index's business.
@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "sub/x", "sub\\x", "..", ".", ""], ids=repr
)
def test_index_that_names_no_plain_file(folder, name):
    write_index(folder, {"a": FIRST, "b": name})
    assert refusal(folder) == f"{LABEL}{INDEX} names {name!r}, which is not a plain file name"


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\0b", "\ud800", "a\nb"], ids=lambda name: ascii(name)[:8]
)
def test_index_that_names_an_impossible_file(folder, name):
    """Bug: a name of more than 255 bytes raised OSError."""
    write_index(folder, {"a": FIRST, "b": name})
    assert refusal(folder).startswith(f"{LABEL} lacks the shard ")


def test_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    assert refusal(folder) == (
        f"{LABEL} holds shards ({FIRST}) but no *.safetensors.index.json: download the index too"
    )


def test_empty_folder(tmp_path):
    assert refusal(tmp_path) == (f"{LABEL} holds no .safetensors file: download the folder again")


def test_folder_of_pickles(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert refusal(tmp_path) == (
        f"{LABEL} holds pickle files (pytorch_model.bin) and no safetensors: download the "
        "safetensors files"
    )


@pytest.mark.parametrize(("make", "errno"), [(None, 2), (Path.touch, 20)], ids=["missing", "file"])
def test_no_folder(tmp_path, make, errno):
    if make:
        make(tmp_path / "part")
    assert refusal(tmp_path / "part") == (
        f"{LABEL} cannot be read ({os.strerror(errno)}): check that the folder exists"
    )


def test_folder_without_read_permission(folder):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user (root, or Windows)")
    folder.chmod(0)
    try:
        assert refusal(folder).startswith(f"{LABEL} cannot be read (")
    finally:
        folder.chmod(0o700)


def test_quantised_folder(folder):
    (folder / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    assert refusal(folder) == (
        f"{LABEL} holds quantised weights, which cannot be loaded from a folder: use the plain "
        "folder with weight_dtype, or a quantised single file"
    )


JSON_FILES = ["config.json", INDEX]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"\xff\xfe{}", b'{"a":' * 50_000], ids=["empty", "cut", "utf16", "deep"]
)
def test_invalid_json(folder, name, raw):
    (folder / name).write_bytes(raw)
    message = refusal(folder)
    assert message.startswith(f"part/{name} is not valid JSON (")
    assert message.endswith("): download it again")


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(("text", "found"), [("[]", "list"), ("null", "NoneType"), ("1", "int")])
def test_json_that_is_no_object(folder, name, text, found):
    (folder / name).write_text(text)
    assert refusal(folder) == f"part/{name} must hold a JSON object, got {found}: download it again"


def test_config_that_is_a_dangling_link(folder):
    (folder / "config.json").symlink_to("gone")
    assert refusal(folder) == (
        f"part/config.json cannot be read ({os.strerror(2)}): check that the file exists and that "
        "you may read it"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_config_that_leads_to_a_pipe_is_not_waited_for(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (folder / "config.json").symlink_to(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append(refusal(folder)), daemon=True)
    reader.start()
    reader.join(timeout=5)
    assert found == ["part/config.json is not a file: download it again"]


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_text('{"ü": [1, null]}', "utf-8")
    assert read_json(tmp_path / "x.json") == {"ü": [1, None]}
