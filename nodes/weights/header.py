"""The header of a safetensors file: which tensors it holds and whether the file is whole."""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

# safetensors' own limit on the header, in bytes.
MAX_HEADER_BYTES = 100_000_000


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
    start: where its values begin in the file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int


@dataclass(frozen=True)
class Header:
    """What one safetensors file says about itself."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file, without touching the tensors.

    The safetensors library judges the file. Our own checks are for what it lets through.

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
        with path.open("rb") as file:
            start = file.read(128)
            _refuse_other_formats(name, start)
            header_bytes = int.from_bytes(start[:8], "little")
            _ask_library(path, header_bytes, status.st_size)
            file.seek(8)
            raw = file.read(header_bytes)
    except OSError as error:
        raise unreadable(name, error) from error
    try:
        entries = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _malformed(name, f"not valid JSON ({error})") from error
    metadata = entries.pop("__metadata__", None) or {}
    data_start = 8 + header_bytes
    tensors = {
        tensor: _tensor_info(name, tensor, entry, data_start) for tensor, entry in entries.items()
    }
    expected = data_start + sum(info.nbytes for info in tensors.values())
    if status.st_size < expected:
        raise _truncated(name, expected, status.st_size)
    if status.st_size > expected:
        why = f"it has {status.st_size} bytes where its header describes {expected} bytes"
        raise _malformed(name, why)
    return Header(path, tensors, metadata)


def pickle_sentence(name: str) -> str:
    """What to tell the user who chose a pickle file."""
    return f"{name} is a pickle file, which can run code when it is opened: use a .safetensors file"


def unreadable(name: str, error: OSError) -> WeightsError:
    """The error for a file that cannot be read."""
    return WeightsError(
        f"{name} cannot be read ({error.strerror or error}): check that the file exists and that "
        "you may read it"
    )


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


def _ask_library(path: Path, header_bytes: int, file_bytes: int) -> None:
    """Raises what the safetensors library finds, except for a wrong number of data bytes."""
    name = path.name
    if file_bytes < 8:  # an empty file cannot be mapped on every system
        raise WeightsError(
            f"{name} is truncated: a safetensors file has at least 8 bytes, this one has "
            f"{file_bytes}: download it again"
        )
    try:
        with safe_open(path, framework="np"):  # "pt" would also make a torch storage of the file
            return
    except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        if header_bytes > MAX_HEADER_BYTES:
            raise WeightsError(
                f"{name} is not a safetensors file: its first 8 bytes give a header of "
                f"{header_bytes} bytes, more than {MAX_HEADER_BYTES}: download it again"
            ) from error
        if file_bytes < 8 + header_bytes:
            raise _truncated(name, 8 + header_bytes, file_bytes) from error
        # The library checks the entries first. It does not say how many bytes they describe.
        # "incomplete metadata, ..."; before safetensors 0.6 "MetadataIncompleteBuffer".
        if "ncomplete" not in why:
            raise _malformed(name, why) from error


def _truncated(name: str, expected: int, found: int) -> WeightsError:
    return WeightsError(
        f"{name} is truncated: its header describes {expected} bytes, the file has {found} bytes: "
        "download it again"
    )


def _malformed(name: str, why: str) -> WeightsError:
    return WeightsError(f"{name} has a malformed safetensors header: {why:.200}: download it again")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is in it twice")
    return table


def _tensor_info(name: str, tensor: str, entry: Any, data_start: int) -> TensorInfo:
    # The library also takes an entry as a list, an element type as a table, and unknown fields.
    fields = ("dtype", "shape", "data_offsets")
    is_entry = isinstance(entry, dict) and entry.keys() == set(fields)
    if not is_entry or not isinstance(entry["dtype"], str):
        raise _malformed(name, f"the entry of {reprlib.repr(tensor)} must have the fields {fields}")
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    # A shape with a 0 in it fills no byte, so the library takes any size beside the 0.
    if 0 in shape and sum(extent.bit_length() for extent in shape) > 63:
        raise _malformed(name, f"{reprlib.repr(tensor)} has the shape {reprlib.repr(shape)}")
    return TensorInfo(entry["dtype"], tuple(shape), end - start, data_start + start)
