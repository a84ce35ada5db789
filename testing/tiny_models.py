"""Seeded random weights in the layouts in which Z-Image-Turbo is published. Needs no host.

Two layouts: the sharded diffusers folder (Hugging Face, Tongyi-MAI/Z-Image-Turbo) and the single
files (Hugging Face, Comfy-Org/z_image_turbo). Two sizes: *small*, every weight random, to compare
numbers (a host loads it only with `widen_detection.py`), and *real width*, the true shapes with few
layers, whose files are mostly holes, for the unmodified host.

A tensor's values depend on the seed and on its name in the folder alone, so the same seed gives the
same weights in both layouts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from .published_layout import (
    RowRun,
    SparseTensors,
    single_file_part,
    single_file_shape,
    write_shards,
    write_sparse,
)

SINGLE_FILE_NAMES = {
    "transformer": "diffusion_models/z_image_turbo_bf16.safetensors",
    "text_encoder": "text_encoders/qwen_3_4b.safetensors",
    "vae": "vae/ae.safetensors",
}
VOCABULARY = 151936
_EMBEDDING = "model.embed_tokens.weight"
_FILE_STEM = {"transformer": "diffusion_pytorch_model", "text_encoder": "model"}
# Renders a user message as Qwen3's template does: only without thinking an empty thought is added.
_CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{%- endif %}"
)
_MODEL_INDEX = {
    "_class_name": "ZImagePipeline",
    "_diffusers_version": "0.36.0.dev0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3Model"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_small_folder(
    root: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    dim: int = 384,
    cap_feat_dim: int = 64,
    te_layers: int = 3,
    max_shard_size: str = "8MB",
) -> Path:
    """The diffusers folder, saved by diffusers and transformers themselves.

    `dim` must be a multiple of 384: only there host and diffusers round the feed-forward width
    alike. The VAE has its true widths (the host pins the encoder's), in bfloat16, as published.
    """
    if dim % 384:
        raise ValueError(f"dim must be a multiple of 384, got {dim}")
    modules = _modules(layers, dim, cap_feat_dim, te_layers, small=True)
    for part, module in modules.items():
        stored_in = torch.bfloat16 if part == "vae" else dtype
        weights = {
            name: _values(name, shape, shape[0], seed).to(stored_in)
            for name, shape in _shapes(module).items()
        }
        tied = {} if part != "text_encoder" else {"lm_head.weight": weights[_EMBEDDING]}
        module.load_state_dict({**weights, **tied}, assign=True)
        limit = {} if part == "vae" else {"max_shard_size": max_shard_size}
        module.save_pretrained(root / part, **limit)
    _write_rest(root)
    return root


def write_real_width_folder(
    root: Path,
    *,
    seed: int = 0,
    layers: int = 1,
    te_layers: int = 3,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """The diffusers folder at the published widths; each file is mostly a hole.

    Random: every vector, the first rows of every matrix, the common tokens of the embedding table.
    """
    for part, module in _modules(layers, 3840, 2560, te_layers, small=False).items():
        folder = root / part
        folder.mkdir(parents=True, exist_ok=True)
        if part == "text_encoder":
            module.config.architectures = ["Qwen3ForCausalLM"]
            module.config.save_pretrained(folder)
        else:
            module.save_config(folder)
        tensors = _sparse_tensors(part, module, seed)
        if part == "vae":
            write_sparse(folder / "diffusion_pytorch_model.safetensors", tensors, dtype)
        else:
            write_shards(folder, _FILE_STEM[part], tensors, dtype)
    _write_rest(root)
    return root


def write_single_files(folder: Path, models_dir: Path) -> dict[str, Path]:
    """The weights of `folder` in the single-file layout, bit for bit."""
    paths = {}
    for part, relative in SINGLE_FILE_NAMES.items():
        slots: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in _read_folder(folder / part):
            target = single_file_part(part, name)
            shape = single_file_shape(part, name, tensor.shape)
            slots.setdefault(target.name, {})[target.slot] = tensor.reshape(shape)
        merged = {
            name: torch.cat([pieces[i] for i in sorted(pieces)]).contiguous()
            for name, pieces in slots.items()
        }
        paths[part] = models_dir / relative
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        save_file(merged, paths[part], metadata={"format": "pt"})
    return paths


def write_real_width_files(
    models_dir: Path,
    *,
    seed: int = 0,
    layers: int = 1,
    te_layers: int = 36,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Path]:
    """The single files at the published widths, with holes; the same weights as the folder's."""
    paths = {}
    for part, module in _modules(layers, 3840, 2560, te_layers, small=False).items():
        merged: SparseTensors = {}
        for name, (shape, runs) in _sparse_tensors(part, module, seed).items():
            target = single_file_part(part, name)
            full_shape = [shape[0] * target.slots, *single_file_shape(part, name, shape)[1:]]
            into = merged.setdefault(target.name, (full_shape, []))[1]
            into += [RowRun(first + target.slot * shape[0], rows) for first, rows in runs]
        paths[part] = models_dir / SINGLE_FILE_NAMES[part]
        paths[part].parent.mkdir(parents=True, exist_ok=True)
        write_sparse(paths[part], merged, dtype)
    return paths


def _modules(
    layers: int, dim: int, hidden: int, te_layers: int, *, small: bool
) -> dict[str, torch.nn.Module]:
    """The three models on the meta device: names, shapes and configuration files, no memory."""
    with torch.device("meta"):
        transformer = ZImageTransformer2DModel(
            dim=dim, n_layers=layers, n_heads=dim // 128, n_kv_heads=dim // 128, cap_feat_dim=hidden
        )
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=VOCABULARY,
                hidden_size=hidden,
                intermediate_size=3 * hidden if small else 9728,
                num_hidden_layers=te_layers,
                num_attention_heads=2 if small else 32,
                num_key_value_heads=1 if small else 8,
                head_dim=128,
                max_position_embeddings=40960,
                rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
                tie_word_embeddings=True,
                bos_token_id=151643,
                eos_token_id=151645,
                max_window_layers=te_layers,
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    return {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    # The output head is the embedding table (tied), and a published file holds it once.
    return {n: tuple(t.shape) for n, t in module.state_dict().items() if n != "lm_head.weight"}


def _values(
    name: str, shape: tuple[int, ...], rows: int, seed: int, first_row: int = 0
) -> torch.Tensor:
    """`rows` rows of the tensor, scaled so that activations stay of order 1 in every layer."""
    key = f"{seed}:{first_row}:{name}".encode()
    generator = torch.Generator().manual_seed(zlib.crc32(key))
    noise = torch.randn(rows, *shape[1:], generator=generator)
    if name.endswith("pad_token") or name == _EMBEDDING:
        return noise
    if len(shape) == 1:
        # A norm's scale stays near 1; a bias is not zero, or an adaLN gate would shut its block.
        return 1 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.1 * noise
    return noise * (noise[0].numel() ** -0.5)


def _sparse_tensors(part: str, module: torch.nn.Module, seed: int) -> SparseTensors:
    rows = 16 if part == "text_encoder" else 64
    tensors: SparseTensors = {}
    for name, shape in _shapes(module).items():
        spans = [(0, shape[0] if len(shape) == 1 else min(rows, shape[0]))]
        if name == _EMBEDDING:
            # Common words and the chat markers; all other tokens are the zero vector.
            spans = [(0, 2048), (151640, 32)]
        runs = [RowRun(first, _values(name, shape, n, seed, first)) for first, n in spans]
        tensors[name] = (shape, runs)
    return tensors


def _read_folder(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (the reader is no mapping)
                yield name, file.get_tensor(name)


def _write_rest(root: Path) -> None:
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(_MODEL_INDEX, indent=2) + "\n")
    host = os.environ.get("ZIMAGE_HOST_DIR")
    if host:  # the vocabulary is 4 MB and not ours: without a host the folder has no tokenizer
        source = Path(host, "comfy", "text_encoders", "qwen25_tokenizer")
        tokenizer = Qwen2Tokenizer.from_pretrained(source)
        tokenizer.chat_template = _CHAT_TEMPLATE
        tokenizer.save_pretrained(root / "tokenizer")


def _write_small_files(models_dir: Path, *, seed: int, layers: int) -> dict[str, Path]:
    with tempfile.TemporaryDirectory() as folder:
        write_small_folder(Path(folder), seed=seed, layers=layers)
        return write_single_files(Path(folder), models_dir)


def main() -> None:
    writers: dict[str, Callable] = {
        "small-folder": write_small_folder,
        "small-files": _write_small_files,
        "real-folder": write_real_width_folder,
        "real-files": write_real_width_files,
    }
    parser = argparse.ArgumentParser(description="Write random Z-Image-Turbo weights.")
    parser.add_argument("kind", choices=writers)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args()
    print(writers[args.kind](args.dir, seed=args.seed, layers=args.layers))


if __name__ == "__main__":
    main()
