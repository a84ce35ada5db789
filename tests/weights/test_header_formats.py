"""What is no safetensors file: other formats under its name, folders, links, pipes."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from pack.nodes.weights.header import WeightsError, read_header
from pack.testing.fake_files import write_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 500
    return message


PICKLE = (
    "x.safetensors is a pickle file, which can run code when it is opened: use a .safetensors file"
)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_torch_checkpoint_under_another_name(path, zipped):
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=zipped)
    assert refusal(path) == PICKLE


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_raw_pickle_under_another_name(path, protocol):
    path.write_bytes(pickle.dumps({"a": list(range(200))}, protocol=protocol))
    assert refusal(path) == PICKLE


def test_gguf(path):
    path.write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 100)
    assert refusal(path) == "x.safetensors is a GGUF file: load it with a GGUF loader node"


def test_git_lfs_pointer(path):
    path.write_bytes(b"version https:" + b"//git-lfs.example/spec/v1\noid sha256:00\nsize 9\n")
    assert refusal(path) == (
        "x.safetensors is a Git LFS pointer, not the weights themselves: "
        "fetch it with 'git lfs pull'"
    )


@pytest.mark.parametrize("text", [b"<!DOCTYPE html><html></html>", b'{"error": "not found"}'])
def test_a_web_page_saved_as_weights(path, text):
    path.write_bytes(text)
    assert refusal(path).startswith("x.safetensors is not a safetensors file: ")


def test_a_folder(path):
    path.mkdir()
    assert refusal(path) == (
        "x.safetensors is a folder, not a weight file: choose a .safetensors file"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(path):
    os.mkfifo(path)
    found = []
    reader = threading.Thread(target=lambda: found.append(refusal(path)), daemon=True)
    reader.start()
    reader.join(timeout=5)
    assert found == [
        "x.safetensors is a pipe or a device, not a weight file: choose a .safetensors file"
    ]


CANNOT_READ = (
    "x.safetensors cannot be read ({}): check that the file exists and that you may read it"
)


def test_a_missing_file(path):
    assert refusal(path) == CANNOT_READ.format(os.strerror(2))


def test_a_dangling_link(path):
    path.symlink_to("elsewhere.safetensors")
    assert refusal(path) == CANNOT_READ.format(os.strerror(2))


def test_a_link_to_itself(path):
    path.symlink_to(path.name)
    assert refusal(path).startswith("x.safetensors cannot be read (")


def test_a_file_without_read_permission(path):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user (root, or Windows)")
    write_file(path, {"a": (1,)})
    path.chmod(0)
    assert refusal(path) == CANNOT_READ.format(os.strerror(13))
