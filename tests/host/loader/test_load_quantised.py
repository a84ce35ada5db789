"""Quantised layers keep their scales, however their files are named; or the load is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.weights.header import WeightsError
from pack.testing import fake_files
from pack.testing.loading import Scratch, is_equal, load, weights, write_tiny_vae
from safetensors.torch import load_file, save_file

LIST = "_quantization_metadata"
MARKS = ["scaled_fp8", LIST, "comfy_quant"]
PREFIX = "model.diffusion_model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def names(small_files: dict[str, Path], host) -> Iterator[dict[str, str]]:
    vae = write_tiny_vae(host)
    yield {part: path.name for part, path in small_files.items()} | {"vae": vae.name}
    vae.unlink()


@pytest.fixture
def put(host) -> Iterator[Scratch]:
    scratch = Scratch(host.models_dir)
    yield scratch
    scratch.clear()


def quantised(tensors: Tensors, mark: str) -> tuple[Tensors, dict[str, str]]:
    """Tensors with the layers' matrices in scaled fp8, and the metadata of their file."""
    found, conf = dict(tensors), {"format": "float8_e4m3fn"}
    layers = [n.removesuffix(".weight") for n, t in tensors.items() if is_matrix(n, t)]
    for layer in layers:
        scale = tensors[f"{layer}.weight"].abs().max() / 448
        found[f"{layer}.weight"] = (tensors[f"{layer}.weight"] / scale).to(torch.float8_e4m3fn)
        found[f"{layer}.{'scale_weight' if mark == 'scaled_fp8' else 'weight_scale'}"] = scale
        if mark == "comfy_quant":
            found[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode())).byte()
    if mark == "scaled_fp8":
        found[mark] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    listed = {LIST: json.dumps({"layers": dict.fromkeys(layers, conf)})}
    return found, listed if mark == LIST else {}


def save(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    save_file(tensors, path, metadata)


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return "layers." in name and name.endswith(".weight") and tensor.ndim == 2


def write_folder(folder: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Two shards, each with the list of its own layers, and the mark of all in one of them."""
    folder.mkdir(parents=True)
    weight_map = {}
    layers = json.loads(metadata[LIST])["layers"] if metadata else {}
    for number in range(2):
        shard = dict(list(tensors.items())[number::2])
        own = {
            layer: conf
            for layer, conf in layers.items()
            if any(name.endswith(f"{layer}.weight") for name in shard)  # the list may lack a prefix
        }
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file(shard, folder / file, {LIST: json.dumps({"layers": own})} if layers else None)
        weight_map |= dict.fromkeys(shard, file)
    fake_files.write_index(folder, weight_map)


def assert_scaled(loaded: Any, wanted: Any, originals: Mapping[str, torch.Tensor]) -> None:
    """Loaded as by the host's loader, and equal to the originals up to fp8's three bits."""
    assert is_equal(weights(loaded), weights(wanted))
    module = loaded.cond_stage_model if hasattr(loaded, "cond_stage_model") else loaded.model
    matrices = {n: t for n, t in originals.items() if is_matrix(n, t)}
    modules = dict(module.named_modules())
    for name, original in matrices.items():
        path = next(p for p in modules if f".{p}.".endswith(f".{name.removesuffix('weight')}"))
        weight = modules[path].weight.dequantize().float()
        assert torch.allclose(weight, original, rtol=2**-4, atol=original.abs().max() / 2**17), name
    assert len(matrices) > 10


@pytest.fixture(scope="module", params=MARKS)
def marked(request, host, small_files, names) -> Iterator[tuple[str, Tensors, Any]]:
    """The mark, the original tensors, and the CLIP of a file that the host loads by itself."""
    originals = load_file(small_files["text_encoder"])
    path = host.models_dir / "text_encoders" / "stock.safetensors"
    save(path, *quantised(originals, request.param))
    yield request.param, originals, load(names["transformer"], path.name, names["vae"]).clip
    path.unlink()


@pytest.mark.parametrize("layout", ["", "language_model.model.", "folder"])
def test_a_text_encoder(marked, names, put, layout):
    """Bug: without the prefix `model.`, and from a folder, the scales were lost (std 1.0)."""
    mark, originals, wanted = marked
    if layout == "folder":
        choice = "Quantised/"
        folder = put("diffusers", "Quantised") / "text_encoder"
        write_folder(folder, *quantised(originals, mark))
    else:
        choice = "prefixed.safetensors"
        renamed = {layout + n.removeprefix("model."): t for n, t in originals.items()}
        save(put("text_encoders", choice), *quantised(renamed, mark))
    found = load(names["transformer"], choice, names["vae"]).clip
    assert_scaled(found, wanted, originals)


def by_the_host(host: Any, path: Path, tensors: Tensors, metadata: dict[str, str]) -> Any:
    """The MODEL of a file that the host loads by itself."""
    save(path, tensors, metadata)
    return host.nodes.UNETLoader().load_unet(path.name, "default")[0]


@pytest.mark.parametrize("mark", MARKS)
def test_a_transformer_folder(host, small_files, names, put, mark):
    """Bug: a list in the metadata of the shards did not reach the host."""
    originals = load_file(small_files["transformer"])
    stock, listed = quantised(originals, mark)
    wanted = by_the_host(host, put("diffusion_models", "stock.safetensors"), stock, listed)
    write_folder(put("diffusers", "Quantised") / "transformer", stock, listed)
    found = load("Quantised/", names["text_encoder"], names["vae"]).model
    assert_scaled(found, wanted, originals)


@pytest.mark.parametrize(
    ("mark", "on_mark"),
    [(m, p) for m in MARKS for p in ("", PREFIX) if (m, p) != ("comfy_quant", "")],
)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_transformer_with_a_prefix(host, small_files, names, put, layout, mark, on_mark):
    """Bug: 0.16.3 dropped the scales of two of the marks; a folder was refused at the load."""
    originals = load_file(small_files["transformer"])
    stock, listed = quantised(originals, mark)
    wanted = by_the_host(host, put("diffusion_models", "stock.safetensors"), stock, listed)

    renamed = {(on_mark if n == mark else PREFIX) + n: t for n, t in stock.items()}
    if listed:
        layers = json.loads(listed[LIST])["layers"]
        listed = {LIST: json.dumps({"layers": {on_mark + n: conf for n, conf in layers.items()}})}
    if layout == "folder":
        choice = "Quantised/"
        write_folder(put("diffusers", "Quantised") / "transformer", renamed, listed)
    else:
        choice = "prefixed.safetensors"
        save(put("diffusion_models", choice), renamed, listed)
    found = load(choice, names["text_encoder"], names["vae"]).model
    assert_scaled(found, wanted, originals)


def test_the_index_decides_which_copy_counts(host, small_files, names, put):
    """Bug: of two shards that hold a tensor, the later one won."""
    originals = load_file(small_files["transformer"])
    stock, listed = quantised(originals, "comfy_quant")
    wanted = by_the_host(host, put("diffusion_models", "stock.safetensors"), stock, listed)
    folder = put("diffusers", "Quantised") / "transformer"
    write_folder(folder, stock, listed)
    first, last = sorted(folder.glob("*.safetensors"))
    stale = {n: torch.zeros_like(t) for n, t in load_file(first).items() if is_matrix(n, t)}
    save(last, load_file(last) | stale, {})
    found = load("Quantised/", names["text_encoder"], names["vae"]).model
    assert_scaled(found, wanted, originals)


def refusal(*choices: str) -> str:
    with pytest.raises(WeightsError) as caught:
        load(*choices)
    return str(caught.value)


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_a_transformer_with_diffusers_names(small_folder, names, put, layout):
    """The host fuses q, k and v of it without their scales."""
    originals: Tensors = {}
    for shard in (small_folder / "transformer").glob("*.safetensors"):
        originals |= load_file(shard)
    tensors, listed = quantised(originals, LIST)
    if layout == "folder":
        choice, label = "Quantised/", "Quantised/transformer/"
        write_folder(put("diffusers", "Quantised") / "transformer", tensors, listed)
    else:
        choice = label = "quantised.safetensors"
        save(put("diffusion_models", choice), tensors, listed)
    assert refusal(choice, names["text_encoder"], names["vae"]) == (
        f"{label} holds quantised weights with diffusers' tensor names, for which ComfyUI drops "
        "the scales: choose the plain weights and a weight_dtype, or a file quantised for ComfyUI"
    )


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_scales_without_a_mark(small_files, names, put, part):
    tensors, _ = quantised(load_file(small_files[part]), LIST)
    kinds = {"transformer": "diffusion_models", "text_encoder": "text_encoders"}
    save_file(tensors, put(kinds[part], "unmarked.safetensors"))
    choices = {**names, part: "unmarked.safetensors"}
    scale = next(name for name in tensors if name.endswith(".weight_scale"))
    assert refusal(*choices.values()) == (
        f"unmarked.safetensors holds the scale {scale}, and nothing in it tells ComfyUI to apply "
        "it: choose plain weights, or a file that was quantised for ComfyUI"
    )
