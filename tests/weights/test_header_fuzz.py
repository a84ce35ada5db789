"""Random files: `read_header` answers or refuses, and never accepts what safetensors refuses.

The oracle is the safetensors library, which the host loads with. `read_header` may be stricter (a
name twice, unknown fields), so that direction is tested with files that the library itself wrote.
"""

from __future__ import annotations

import json
import re
import struct
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from pack.nodes.weights.header import Header, WeightsError, read_header
from pack.testing.fake_files import DTYPE_BITS, overwrite
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

MAX_SECONDS = 1.0


def bounded(max_examples: int) -> settings:
    return settings(
        derandomize=True,
        database=None,
        deadline=None,  # wall time depends on the neighbours; thread time is checked instead
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture
def outcomes():
    """Counts what was accepted and refused; a fuzz test that sees only one of them tests little."""
    counts: Counter[str] = Counter()
    yield counts
    assert min(counts["accepted"], counts["refused"]) >= 10, counts


def library_reads(path: Path) -> tuple[dict, dict] | None:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            return found, file.metadata() or {}
    except SafetensorError:
        return None


def check(path: Path, raw: bytes) -> Header | None:
    """What `read_header` says of a file of these bytes, checked against the library."""
    overwrite(path, raw)
    start = time.thread_time()
    try:
        header = read_header(path)
    except WeightsError as error:
        header = None
        assert str(error).startswith(path.name)
        assert len(str(error)) < 600
        assert str(error).isprintable()
    assert time.thread_time() - start < MAX_SECONDS
    if header is not None:
        told = {n: (t.dtype, t.shape) for n, t in header.tensors.items()}
        assert (told, header.metadata) == library_reads(path)
    return header


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
library_dtypes = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float8_e5m2]
)


@st.composite
def library_files(draw: st.DrawFn) -> bytes:
    """A file that the library wrote; sometimes with more spaces behind the header."""
    tensors = {}
    for name in draw(st.lists(names, unique=True, max_size=5)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        tensors[name] = torch.zeros(shape, dtype=draw(library_dtypes))
    metadata = draw(
        st.none() | st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1)
    )
    raw = save(tensors, metadata)
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    spaces = draw(st.integers(0, 2000))
    header = raw[8 : 8 + header_bytes] + b" " * spaces
    return struct.pack("<Q", len(header)) + header + raw[8 + header_bytes :]


@bounded(150)
@given(raw=library_files())
def test_accepts_what_the_library_writes(path, raw):
    assert check(path, raw) is not None


@bounded(150)
@given(raw=st.binary(max_size=200))
def test_random_bytes(path, raw):
    check(path, raw)


@bounded(150)
@given(raw=st.binary(max_size=100))
def test_random_bytes_as_header(path, raw):
    check(path, struct.pack("<Q", len(raw)) + raw)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A valid file with its header bytes flipped, cut or grown; its length put right or not."""
    raw = draw(library_files())
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    header, data = bytearray(raw[8 : 8 + header_bytes]), raw[8 + header_bytes :]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(header.rstrip()) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "digit", "insert", "delete", "repeat", "truncate"]))
        if kind == "flip" and header:
            header[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(header) if chr(byte).isdigit()]
            if digits:
                header[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789-.e"))
        elif kind == "insert":
            header[at:at] = draw(st.sampled_from([b"{", b"}", b",", b"0", b"-", b'"', b" ", b"\0"]))
        elif kind == "delete":
            del header[at : at + draw(st.integers(1, 8))]
        elif kind == "repeat":
            header[at:at] = header[at : at + draw(st.integers(1, 40))]
        elif kind == "truncate" and draw(st.booleans()):
            del header[at:]
    length = len(header) if draw(st.integers(0, 3)) else header_bytes
    damaged = struct.pack("<Q", length) + bytes(header) + data
    return damaged[: len(damaged) - draw(st.sampled_from([0, 0, 0, 0, 1, 100]))]


@bounded(400)
@given(raw=damaged_files())
def test_a_valid_file_with_a_damaged_header(path, outcomes, raw):
    outcomes["refused" if check(path, raw) is None else "accepted"] += 1


@bounded(100)
@given(raw=library_files(), at=st.integers(0, 7), byte=st.integers(0, 255))
def test_a_valid_file_with_a_damaged_header_length(path, raw, at, byte):
    check(path, raw[:at] + bytes([byte]) + raw[at + 1 :])


# JSON as text, so that what no writer writes comes up too: -0, NaN, the same name twice.
sizes = [0, 1, 2, 3, 4, 8, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400]
oddities = ["-0", "-1", "1.0", "2e0", "1e999", "NaN", "Infinity", "01", "+1"]
numbers = st.sampled_from([*map(str, sizes), *oddities])
strings = st.sampled_from(
    ['"a"', '"U8"', '"\\ud800"', '"\\u0000"', '"\\ud83d\\ude00"', '"\t"', '""']
)
scalars = numbers | strings | st.sampled_from(["null", "true", "false", "nul"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.lists(st.tuples(strings, inner), max_size=3).map(
            lambda items: "{" + ",".join(f"{k}:{v}" for k, v in items) + "}"
        )
    ),
    max_leaves=6,
)
dtypes = st.sampled_from([json.dumps(dtype) for dtype in [*DTYPE_BITS, "f32", "F128", ""]])


@st.composite
def random_entries(draw: st.DrawFn, start: int, is_wrong: bool) -> tuple[str, int]:
    """An entry that begins at `start`, right or with one thing wrong, and where it ends."""
    dtype = draw(st.sampled_from(list(DTYPE_BITS)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    if dtype.startswith(("F4", "F6")):
        shape = [8, *shape]
    bits = DTYPE_BITS[dtype]
    for extent in shape:
        bits *= extent
    end = start + bits // 8
    fields = {"dtype": f'"{dtype}"', "shape": str(shape), "data_offsets": f"[{start},{end}]"}
    kinds = [*fields, "number", "offset", "zero", "lack", "extra", "extra"]
    wrong = draw(st.sampled_from(kinds)) if is_wrong else "nothing"
    if wrong in fields:
        fields[wrong] = draw(values | dtypes)
    elif wrong == "number":
        shape_text = [str(extent) for extent in shape]
        shape_text.insert(draw(st.integers(0, len(shape))), draw(numbers))
        fields["shape"] = f"[{','.join(shape_text)}]"
    elif wrong == "offset":
        fields["data_offsets"] = f"[{draw(numbers)},{draw(numbers)}]"
    elif wrong == "zero":
        field = draw(st.sampled_from(["shape", "data_offsets"]))
        fields[field] = re.sub(r"\b0\b", "-0", fields[field])
    elif wrong == "lack":
        del fields[draw(st.sampled_from(list(fields)))]
    elif wrong == "extra":
        fields[draw(st.sampled_from(["x", "shape ", "strides"]))] = draw(numbers | values)
    return "{" + ",".join(f'"{k}":{v}' for k, v in fields.items()) + "}", end


@st.composite
def random_files(draw: st.DrawFn) -> bytes:
    """A file with at most one fault, so that each check has to find its own."""
    places = ["entry"] * 8 + ["name", "twice", "metadata", "member", "behind", "size", "none"]
    fault = draw(st.sampled_from(places))
    end, members = 0, []
    tensors = draw(st.lists(st.sampled_from("abcd") | names, unique=True, min_size=1, max_size=3))
    for number, name in enumerate(tensors + tensors[: fault == "twice"]):
        text, end = draw(random_entries(end, fault == "entry" and number == 0))
        is_odd = fault == "name" and number == 0
        members.append(f"{draw(strings) if is_odd else json.dumps(name)}:{text}")
    if fault == "metadata" or draw(st.booleans()):
        right = st.sampled_from(["null", "{}", '{"format":"pt"}', '{"\\ud83d\\ude00":""}'])
        members.append(f'"__metadata__":{draw(values if fault == "metadata" else right)}')
    if fault == "member":
        members.append(f"{draw(strings)}:{draw(values)}")
    text = "{" + ", ".join(draw(st.permutations(members))) + "}"
    text += draw(st.sampled_from(["\0", ",", "{}", "x"] if fault == "behind" else ["", " \n\t"]))
    size = max(end + draw(st.sampled_from([-1, 1])), 0) if fault == "size" else end
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + b"\x3f" * size


@bounded(400)
@given(raw=random_files())
def test_structured_random_headers(path, outcomes, raw):
    outcomes["refused" if check(path, raw) is None else "accepted"] += 1
