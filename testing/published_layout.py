"""The two published layouts of Z-Image-Turbo: key names of the single files, and files with holes.

The conversion is written out from the key names and shares nothing with the host's: it is there to
check the host's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

_SHARD_BYTES = 10**9
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Part(NamedTuple):
    """Where a folder tensor goes in a single file: its new name and the rows before it there."""

    name: str
    slot: int = 0
    slots: int = 1


class RowRun(NamedTuple):
    first_row: int
    values: torch.Tensor


# Each tensor's shape, and the rows of it that are written; the rest of it is a hole.
SparseTensors = dict[str, tuple[Sequence[int], list[RowRun]]]


def single_file_part(part: str, name: str) -> Part:
    """The single file's name for a folder tensor, and its slot where several are fused into one."""
    if part == "text_encoder":
        return Part(name)
    if part == "vae":
        return Part(_vae_name(name))
    fused = re.fullmatch(r"(.+\.attention)\.to_([qkv])\.weight", name)
    if fused:
        return Part(f"{fused[1]}.qkv.weight", slot="qkv".index(fused[2]), slots=3)
    for old, new in (
        (r"^all_(x_embedder|final_layer)\.2-1\.", r"\1."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
    ):
        name = re.sub(old, new, name)
    return Part(name)


def _vae_name(name: str) -> str:
    # The original code counts the decoder's levels from the picture inwards, diffusers outwards.
    name = re.sub(r"up_blocks\.(\d)\.", lambda m: f"up.{3 - int(m[1])}.", name)
    for old, new in (
        (r"down_blocks\.", "down."),
        (r"(down|up)\.(\d)\.resnets\.", r"\1.\2.block."),
        (r"\.(down|up)samplers\.0\.", r".\1sample."),
        (r"mid_block\.resnets\.0\.", "mid.block_1."),
        (r"mid_block\.resnets\.1\.", "mid.block_2."),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"attn_1\.group_norm\.", "attn_1.norm."),
        (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
        (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
        (r"conv_shortcut\.", "nin_shortcut."),
        (r"conv_norm_out\.", "norm_out."),
    ):
        name = re.sub(old, new, name)
    return name


def single_file_shape(part: str, name: str, shape: Sequence[int]) -> list[int]:
    """The shape of a folder tensor in the single file, before any fusing."""
    # The original VAE holds its attention matrices as 1x1 convolutions.
    is_attention_matrix = part == "vae" and ".attentions." in name and len(shape) == 2
    return [*shape, 1, 1] if is_attention_matrix else list(shape)


def write_sparse(path: Path, tensors: SparseTensors, dtype: torch.dtype) -> int:
    """Writes a safetensors file, with holes where no rows are given; returns its tensors' bytes."""
    header: dict = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, (shape, _) in tensors.items():
        starts[name], end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, (_, runs) in tensors.items():
            for first_row, values in runs:
                row_bytes = values[0].numel() * dtype.itemsize
                file.seek(8 + len(text) + starts[name] + first_row * row_bytes)
                file.write(values.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())
    return end


def write_shards(folder: Path, stem: str, tensors: SparseTensors, dtype: torch.dtype) -> None:
    """Writes shards of at most 1 GB (more where one tensor is larger) and their index."""
    shards: list[SparseTensors] = [{}]
    size = 0
    for name, (shape, runs) in tensors.items():
        tensor_bytes = torch.Size(shape).numel() * dtype.itemsize
        if size and size + tensor_bytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = (shape, runs)
        size += tensor_bytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file_name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        total += write_sparse(folder / file_name, shard, dtype)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
