"""The header of a safetensors file: which tensors it holds and whether the file is whole."""

from __future__ import annotations

import json
import reprlib
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# safetensors' own limit on the header, in bytes.
MAX_HEADER_BYTES = 100_000_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


_FIELDS = ("dtype", "shape", "data_offsets")
# Shows what a header holds, which may be long or nested deeply, in a sentence.
_repr = reprlib.Repr()
_repr.maxstring = 120
_repr.maxlevel = 2


class WeightsError(ValueError):
    """A weight file or folder cannot be used; the message is one sentence that says what to do."""

    def __init__(self, message: str) -> None:
        # Names come from the file: a line break or half a character in one stays out of the log.
        super().__init__("".join(c if c.isprintable() else "?" for c in message))


class TensorInfo(NamedTuple):
    """One tensor as a header describes it.

    dtype: safetensors' name of the element type, such as ``BF16``.
    shape: extent per axis.
    nbytes: its size in the file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What one safetensors file says about itself."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file, without touching the tensors.

    Source: the safetensors format: 8 bytes of header length (little endian), JSON, then the data
    without gaps.

    Args:
        path: the file.

    Returns:
        The tensors by name, the metadata and the file's size in bytes.

    Raises:
        WeightsError: the file cannot be read, is of another format, is truncated or is malformed.

    Memory: the header, never the tensors.
    """
    name = path.name
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its other end
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise WeightsError(f"{name} is {kind}, not a weight file: choose a .safetensors file")
        file_bytes = status.st_size
        with path.open("rb") as file:
            start = file.read(128)
            _refuse_other_formats(name, start)
            if file_bytes < 8:
                raise WeightsError(
                    f"{name} is truncated: a safetensors file has at least 8 bytes, this one has "
                    f"{file_bytes}: download it again"
                )
            (header_bytes,) = struct.unpack("<Q", start[:8])
            if header_bytes > MAX_HEADER_BYTES:
                raise WeightsError(
                    f"{name} is no safetensors file: its first 8 bytes announce a header of "
                    f"{header_bytes} bytes, more than {MAX_HEADER_BYTES}: download it again"
                )
            if 8 + header_bytes > file_bytes:
                raise WeightsError(_truncated(name, 8 + header_bytes, file_bytes))
            file.seek(8)
            raw = file.read(header_bytes)
    except OSError as error:
        raise WeightsError(
            f"{name} cannot be read ({error.strerror or error}): check that the file exists and "
            "that you may read it"
        ) from error

    entries = _parse(name, raw)
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed(name, "its metadata is not a table of text")
    tensors, data_bytes = _check_entries(name, entries)
    expected = 8 + header_bytes + data_bytes
    if file_bytes < expected:
        raise WeightsError(_truncated(name, expected, file_bytes))
    if file_bytes > expected:
        raise _malformed(
            name, f"it has {file_bytes} bytes where its header describes {expected} bytes"
        )
    return Header(path, tensors, metadata, file_bytes)


def pickle_sentence(name: str) -> str:
    """What to tell the user who chose a pickle file."""
    return f"{name} is a pickle file, which can run code when it is opened: use a .safetensors file"


def _truncated(name: str, expected: int, found: int) -> str:
    return (
        f"{name} is truncated: its header describes {expected} bytes, the file has {found} bytes: "
        "download it again"
    )


def _malformed(name: str, why: str) -> WeightsError:
    return WeightsError(f"{name} has a malformed safetensors header: {why}: download it again")


def _refuse_other_formats(name: str, start: bytes) -> None:
    if start[8:9] == b"{":
        return  # a header's length may begin with the bytes of another format
    if start.startswith(b"GGUF"):
        raise WeightsError(f"{name} is a GGUF file: load it with a GGUF loader node")
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"):
        raise WeightsError(pickle_sentence(name))
    if start.startswith(b"version ") and b"git-lfs" in start:
        raise WeightsError(
            f"{name} is a Git LFS pointer, not the weights themselves: fetch it with 'git lfs pull'"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands in it twice")
    return table


def _natural(text: str) -> int:
    # "-0" too: the safetensors library takes it for a fraction.
    if text.startswith("-"):
        raise ValueError(f"the negative number {text}")
    return int(text)


def _parse(name: str, raw: bytes) -> dict[str, Any]:
    # The format asks for an opening brace at once; padding is allowed behind the JSON only.
    if not raw.startswith(b"{"):
        raise _malformed(name, "it does not begin with '{'")
    try:
        text = raw.decode("utf-8")
        entries = json.loads(text, object_pairs_hook=_no_duplicates, parse_int=_natural)
        if "\\u" in text:  # an escaped half of a surrogate pair is no character
            json.dumps(entries, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _malformed(name, f"not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _malformed(name, "it is not a JSON object")
    return entries


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _elements(shape: list[int]) -> int:
    """The number of elements, or 2**63 where it is that or more, zeros aside."""
    count = 1
    for extent in shape:
        count *= max(extent, 1)
        if count >= 2**63:  # not math.prod: for a long list of large numbers it takes minutes
            return 2**63
    return 0 if 0 in shape else count


def _check_entries(name: str, entries: Mapping[str, Any]) -> tuple[dict[str, TensorInfo], int]:
    """Returns the tensors and the number of data bytes that they fill without a gap."""
    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for tensor, entry in entries.items():
        shown = _repr.repr(tensor)
        if not isinstance(entry, dict) or entry.keys() != set(_FIELDS):
            raise _malformed(name, f"the entry of {shown} must have the fields {_FIELDS}")
        dtype, shape, span = (entry[field] for field in _FIELDS)
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise _malformed(name, f"{shown} has the unknown element type {_repr.repr(dtype)}")
        if not isinstance(shape, list) or not _is_sizes(shape):
            raise _malformed(name, f"{shown} has the shape {_repr.repr(shape)}")
        if not isinstance(span, list) or not _is_sizes(span) or len(span) != 2:
            raise _malformed(name, f"{shown} has the data offsets {_repr.repr(span)}")
        start, end = span
        if _elements(shape) * DTYPE_BITS[dtype] != (end - start) * 8:
            raise _malformed(
                name,
                f"{shown} of shape {_repr.repr(shape)} and type {dtype} cannot fill "
                f"{end - start} bytes",
            )
        tensors[tensor] = TensorInfo(dtype, tuple(shape), end - start)
        spans.append((start, end, tensor))
    end_of_last = 0
    for start, end, tensor in sorted(spans):
        if start != end_of_last:
            raise _malformed(
                name, f"{_repr.repr(tensor)} begins at byte {start}, not at {end_of_last}"
            )
        end_of_last = end
    return tensors, end_of_last
