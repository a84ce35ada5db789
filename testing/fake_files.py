"""Safetensors files written by hand, valid and broken, and the tensor names of small models."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pack.nodes.weights.component import Component
from pack.nodes.weights.header import TensorInfo

# The element types of safetensors 0.8, and the bits of each.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

# Shapes by tensor name; the element type is chosen once for all of them.
Shapes = Mapping[str, Sequence[int]]


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    size = DTYPE_BITS[dtype]
    for extent in shape:
        size *= extent
    return size // 8


def entry(dtype: str, shape: Sequence[int], start: int) -> dict[str, Any]:
    end = start + nbytes(dtype, shape)
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A file of that header (JSON text, or what is made into it) and data, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def overwrite(path: Path, data: bytes) -> None:
    """Writes in place: some file systems flush what was truncated to nothing, which is slow."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def write_file(
    path: Path, shapes: Shapes, *, dtype: str = "F32", metadata: Mapping[str, str] | None = None
) -> Path:
    """A valid file of zeros; the zeros are a hole, so that it is small on disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        header[name] = entry(dtype, shape, end)
        end = header[name]["data_offsets"][1]
    raw = file_bytes(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + end)
    return path


def write_shards(
    folder: Path, shards: Sequence[Shapes], *, stem: str = "model", dtype: str = "F32"
) -> Path:
    """A component folder of shards with their index, as `save_pretrained` names them."""
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, shapes, dtype=dtype)
        weight_map |= dict.fromkeys(shapes, name)
    write_index(folder, weight_map, stem=stem)
    return folder


def write_index(folder: Path, weight_map: object, *, stem: str = "model") -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    overwrite(folder / f"{stem}.safetensors.index.json", json.dumps(index).encode())


def component(
    shapes: Shapes,
    *,
    label: str = "x.safetensors",
    dtype: str = "BF16",
    config: Mapping[str, Any] | None = None,
) -> Component:
    """A component without files, for what looks at names and shapes alone."""
    tensors = {n: TensorInfo(dtype, tuple(s), nbytes(dtype, s), 0) for n, s in shapes.items()}
    return Component(label, tensors, {}, (), config or {}, (), is_file=True)


def z_image_shapes(
    *, dim: int = 8, text_width: int = 4, layers: int = 2, diffusers: bool = False
) -> dict[str, tuple[int, ...]]:
    """Z-Image's tensors that its detection looks at, at any width, in either naming."""
    shapes: dict[str, tuple[int, ...]] = {
        "cap_embedder.0.weight": (text_width,),
        "cap_embedder.1.weight": (dim, text_width),
        "all_x_embedder.2-1.weight" if diffusers else "x_embedder.weight": (dim, 64),
        "cap_pad_token": (1, dim),
    }
    fused = {f"to_{k}.weight": (dim, dim) for k in "qkv"}
    attention = fused if diffusers else {"qkv.weight": (3 * dim, dim)}
    for stack, count in (("noise_refiner", 2), ("context_refiner", 2), ("layers", layers)):
        for number in range(count):
            block = f"{stack}.{number}."
            shapes |= {f"{block}attention.{name}": shape for name, shape in attention.items()}
            shapes[f"{block}feed_forward.w1.weight"] = (dim, dim)
            if stack != "context_refiner":
                shapes[f"{block}adaLN_modulation.0.weight"] = (4 * dim, 8)
                shapes[f"{block}adaLN_modulation.0.bias"] = (4 * dim,)
    return shapes


def qwen3_shapes(
    *, width: int = 8, layers: int = 3, prefix: str = "model.", head_dim: int = 128
) -> dict[str, tuple[int, ...]]:
    """Qwen3's tensors: 2 heads, 1 key/value head, feed-forward of twice the width."""
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}embed_tokens.weight": (11, width)}
    for number in range(layers):
        layer = f"{prefix}layers.{number}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (2 * head_dim, width),
            f"{layer}self_attn.k_proj.weight": (head_dim, width),
            f"{layer}self_attn.q_norm.weight": (head_dim,),
            f"{layer}self_attn.k_norm.weight": (head_dim,),
            f"{layer}post_attention_layernorm.weight": (width,),
            f"{layer}mlp.gate_proj.weight": (2 * width, width),
        }
    return shapes | {f"{prefix}norm.weight": (width,)}


def vae_shapes(*, latent_channels: int = 16) -> dict[str, tuple[int, ...]]:
    return {
        "encoder.conv_in.weight": (4, 3, 3, 3),
        "decoder.conv_in.weight": (4, latent_channels, 3, 3),
    }
