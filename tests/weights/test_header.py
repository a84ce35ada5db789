"""What a safetensors header must say, and what the user is told when it does not."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from pack.nodes.weights.header import MAX_HEADER_BYTES, WeightsError, read_header
from pack.testing.fake_files import DTYPE_BITS, entry, file_bytes, write_file
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


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


def malformed(why: str) -> str:
    return f"x.safetensors has a malformed safetensors header: {why}: download it again"


def library_words(path: Path) -> str:
    """Why the library refuses the file; a sentence of the test's own would change with it."""
    with pytest.raises(SafetensorError) as caught, safe_open(path, framework="np"):
        pass
    words = str(caught.value).removeprefix("Error while deserializing header: ")
    assert len(words) > 5
    return words[:200]


def test_reads_what_the_library_wrote(path):
    tensors = {
        "b": torch.zeros(3, 5, dtype=torch.bfloat16),
        "a.weight": torch.zeros(2, 0, 7),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "ünï.名": torch.zeros(4, dtype=torch.int8),
    }
    save_file(tensors, path, metadata={"format": "pt", "note": "x"})
    header = read_header(path)
    assert {n: (t.dtype, t.shape, t.nbytes) for n, t in header.tensors.items()} == {
        "b": ("BF16", (3, 5), 30),
        "a.weight": ("F32", (2, 0, 7), 0),
        "scalar": ("F64", (), 8),
        "ünï.名": ("I8", (4,), 4),
    }
    assert header.metadata == {"format": "pt", "note": "x"}
    assert header.path == path


def test_reads_a_file_without_tensors_or_metadata(path):
    path.write_bytes(file_bytes({"__metadata__": None}))
    assert not read_header(path).tensors
    assert read_header(path).metadata == {}


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_knows_the_sizes_of_the_librarys_element_types(path, dtype):
    path.write_bytes(file_bytes({"a": entry(dtype, [8, 3], 0)}, b"\0" * DTYPE_BITS[dtype] * 3))
    assert read_header(path).tensors["a"].nbytes == DTYPE_BITS[dtype] * 3
    with safe_open(path, framework="pt") as file:  # wrong sizes are errors there
        assert file.get_slice("a").get_dtype() == dtype


# A header's length is the file's first bytes: these look like a pickle's or a zip's.
@pytest.mark.parametrize("header_bytes", [0x0280, 0x0380, 0x0480, 0x0580, 0x010280])
def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(path, header_bytes):
    raw = json.dumps({"a": entry("U8", [1], 0)}).encode().ljust(header_bytes)
    path.write_bytes(file_bytes(raw, b"x"))
    assert list(read_header(path).tensors) == ["a"]


@pytest.mark.parametrize("missing", [1, 100, 4096])
def test_truncated_data(path, missing):
    write_file(path, {"a": (32, 32), "b": (7,)})
    whole = path.stat().st_size
    os.truncate(path, whole - missing)
    assert refusal(path) == (
        f"x.safetensors is truncated: its header describes {whole} bytes, the file has "
        f"{whole - missing} bytes: download it again"
    )


def test_truncated_header(path):
    whole = file_bytes({"a": entry("U8", [1], 0)})
    path.write_bytes(whole[:20])
    assert refusal(path) == (
        f"x.safetensors is truncated: its header describes {len(whole)} bytes, the file has "
        "20 bytes: download it again"
    )


def test_every_beginning_of_a_file_is_refused(path):
    whole = file_bytes({"a": entry("F32", [2, 3], 0)}, b"\x3f" * 24)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert refusal(path).startswith("x.safetensors is truncated: ")
    path.write_bytes(whole)
    read_header(path)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_shorter_than_the_header_length(path, size):
    path.write_bytes(b"\x10" * size)
    assert refusal(path) == (
        "x.safetensors is truncated: a safetensors file has at least 8 bytes, this one has "
        f"{size}: download it again"
    )


def test_oversize_header(path):
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    assert refusal(path) == (
        f"x.safetensors is not a safetensors file: its first 8 bytes give a header of "
        f"{MAX_HEADER_BYTES + 1} bytes, more than {MAX_HEADER_BYTES}: download it again"
    )


def test_bytes_behind_the_data(path):
    whole = write_file(path, {"a": (2,)}).stat().st_size
    with path.open("ab") as file:
        file.write(b"<html>")
    assert refusal(path) == malformed(
        f"it has {whole + 6} bytes where its header describes {whole} bytes"
    )


U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
FIELDS = "must have the fields ('dtype', 'shape', 'data_offsets')"


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b' {"a": 1}',
        b'{"a": 1}',
        {"a": {**U8, "dtype": "F128"}},
        {"a": {**U8, "dtype": 8}},
        {"a": {"shape": [1], "data_offsets": [0, 1]}},
        {"a": {**U8, "shape": 1}},
        {"a": {**U8, "shape": [1.0]}},
        {"a": {**U8, "shape": [True]}},
        {"a": {**U8, "shape": [2**63]}},
        {"a": {**U8, "data_offsets": [0]}},
        {"a": {**U8, "data_offsets": [0, 1, 2]}},
        {"a": {**U8, "data_offsets": "01"}},
        {"a": {**U8, "shape": [2]}},
        {"a": {**U8, "shape": [2], "data_offsets": [1, 0]}},
        {"a": {**U8, "dtype": "F4", "shape": [3]}},
        {"a": {**U8, "shape": [2**62, 4, 0], "data_offsets": [0, 0]}},
        {"a": U8, "b": entry("U8", [1], 2)},
        {"b": entry("U8", [3], 0), "a": entry("U8", [3], 2)},
        {"a": entry("U8", [3], 1)},
        {"__metadata__": {"a": 1}},
        {"__metadata__": []},
        {"__metadata__": 0},
        b"{",
        b'{"a": }',
        b"{}\0",
        b"{} {}",
        b'{"\xff": 1}',
        b'{"a": "' + b"\\",
        b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-0, 1]}}',
        b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}',
        b'{"a":' * 100_000,
        b'{"a": {"dtype": "U8", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 1]}}',
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_the_library_refuses_is_refused_in_its_words(path, header):
    path.write_bytes(file_bytes(header, b"\0" * 16))
    assert refusal(path) == malformed(library_words(path))


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ({"a": {**U8, "strides": [1]}}, f"the entry of 'a' {FIELDS}"),
        ({"a": ["U8", [1], [0, 1]]}, f"the entry of 'a' {FIELDS}"),
        ({"a": {**U8, "dtype": {"U8": None}}}, f"the entry of 'a' {FIELDS}"),
        (
            {"a": {**U8, "shape": [0, 2**62, 4], "data_offsets": [0, 0]}},
            "'a' has the shape [0, 4611686018427387904, 4]",
        ),
        (
            {"a": {**U8, "shape": [0, 2**63], "data_offsets": [0, 0]}},
            "'a' has the shape [0, 9223372036854775808]",
        ),
        (
            b'{"a": %s, "a": %s}' % ((json.dumps(U8).encode(),) * 2),
            "not valid JSON (a name is in it twice)",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_the_library_lets_through(path, header, why):
    data = b"\0" if b"[0, 1]" in file_bytes(header) else b""
    path.write_bytes(file_bytes(header, data))
    with safe_open(path, framework="np"):
        pass
    assert refusal(path) == malformed(why)


@pytest.mark.parametrize(
    "header",
    [
        {"n" * 100_000: 1},
        {"a": {**U8, "dtype": "F" * 100_000}},
        {"a": {**U8, "shape": [1] * 100_000 + [2]}},
        {"a": {**U8, "shape": [2**63 - 2] * 50_000}},
        {"a": {**U8, "shape": [0] + [2**63 - 2] * 50_000, "data_offsets": [0, 0]}},
        {"a": {**U8, "data_offsets": [[[[0] * 1000] * 10]] * 10}},
    ],
    ids=["name", "dtype", "shape", "product", "zero", "offsets"],
)
def test_a_header_of_absurd_length_is_refused_at_once_in_one_sentence(path, header):
    path.write_bytes(file_bytes(header, b"x"))
    start = time.thread_time()
    refusal(path)  # checks the length of the sentence
    assert time.thread_time() - start < 1


WHOLE = file_bytes({"a": entry("F32", [4], 0)}, bytes(16))


@pytest.mark.parametrize(
    ("content", "is_whole"),
    [
        (WHOLE, True),
        (WHOLE[:-1], False),
        (WHOLE[:20], False),
        (file_bytes({"a": entry("F32", [5], 0)}, bytes(16)), False),
        (b"GGUF" + bytes(28), False),
    ],
    ids=["whole", "truncated", "truncated header", "malformed", "another format"],
)
def test_no_file_stays_open(path, content, is_whole):
    """An open file cannot be replaced on Windows. The error in hand keeps the reader's frames."""
    path.write_bytes(content)
    error: WeightsError | None = None
    try:
        read_header(path)
    except WeightsError as refused:
        error = refused
    assert (error is None) == is_whole
    if Path("/proc/self/maps").exists():
        descriptors = Path("/proc/self/fd").iterdir()
        assert str(path) not in [os.path.realpath(descriptor) for descriptor in descriptors]
        assert str(path) not in Path("/proc/self/maps").read_text()
    path.unlink()  # fails on Windows for an open file
