"""The loader node in a real host: every way to choose its files, and what comes out of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pack.testing.loading import (
    FOLDER,
    OTHER,
    SAME,
    Loaded,
    Scratch,
    is_equal,
    load,
    node,
    shift_of,
    weights,
    write_tiny_vae,
)
from safetensors.torch import load_file, save_file

DTYPES = {
    "default": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e4m3fn_fast": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@pytest.fixture(scope="module")
def other_folder(host, widened, small_folder: Path) -> Iterator[Path]:
    """Another text encoder and VAE than the folder's, to see which one was loaded."""
    from pack.testing import tiny_models

    root = small_folder.with_name(OTHER.rstrip("/"))
    yield tiny_models.write_small_folder(root, seed=1)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def names(small_files: dict[str, Path]) -> dict[str, str]:
    return {part: path.name for part, path in small_files.items()}


@pytest.fixture(scope="module")
def tiny_vae(host) -> Iterator[str]:
    path = write_tiny_vae(host)
    yield path.name
    path.unlink()


@pytest.fixture(scope="module")
def from_folder(small_folder: Path) -> Loaded:
    return load(FOLDER, SAME, SAME)


# In the folder's own words: seed 0 is the folder of the transformer, seed 1 the other one.
@pytest.mark.parametrize(
    ("transformer", "text_encoder", "vae", "te_seed", "vae_seed"),
    [
        (FOLDER, SAME, OTHER, 0, 1),
        (FOLDER, OTHER, SAME, 1, 0),
        (FOLDER, OTHER, "file", 1, 0),
        (FOLDER, "file", OTHER, 0, 1),
        (FOLDER, "file", SAME, 0, 0),
        (FOLDER, SAME, "file", 0, 0),
        (FOLDER, FOLDER, FOLDER, 0, 0),
        ("file", "file", "file", 0, 0),
        ("file", OTHER, FOLDER, 1, 0),
        ("file", FOLDER, OTHER, 0, 1),
    ],
)
def test_a_mix_loads_each_part_from_where_it_was_chosen(
    names, from_folder, other_weights, transformer, text_encoder, vae, te_seed, vae_seed
):
    choices = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    found = load(*(names[part] if c == "file" else c for part, c in choices.items()))
    sources = (from_folder, other_weights)
    assert is_equal(weights(found.model), weights(from_folder.model))
    assert is_equal(weights(found.clip), weights(sources[te_seed].clip))
    assert is_equal(weights(found.vae), weights(sources[vae_seed].vae))


@pytest.fixture(scope="module")
def other_weights(other_folder: Path, from_folder: Loaded) -> Loaded:
    found = load(FOLDER, OTHER, OTHER)
    assert not is_equal(weights(found.clip), weights(from_folder.clip))
    assert not is_equal(weights(found.vae), weights(from_folder.vae))
    return found


def prefixed(source: Path, target: Path, old: str, new: str) -> Path:
    tensors = {new + name.removeprefix(old): tensor for name, tensor in load_file(source).items()}
    save_file(tensors, target)
    return target


@pytest.fixture
def put(host) -> Iterator[Scratch]:
    scratch = Scratch(host.models_dir)
    yield scratch
    scratch.clear()


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "model.model.", "net.", "model."])
def test_a_transformer_file_with_a_prefix(small_files, names, from_folder, put, prefix):
    path = put("diffusion_models", "prefixed.safetensors")
    prefixed(small_files["transformer"], path, "", prefix)
    found = load(path.name, names["text_encoder"], names["vae"])
    assert is_equal(weights(found.model), weights(from_folder.model))


@pytest.mark.parametrize("prefix", ["", "language_model.model."])
def test_a_text_encoder_file_with_another_prefix(small_files, names, from_folder, put, prefix):
    path = put("text_encoders", "prefixed.safetensors")
    prefixed(small_files["text_encoder"], path, "model.", prefix)
    found = load(names["transformer"], path.name, names["vae"])
    assert is_equal(weights(found.clip), weights(from_folder.clip))


def test_a_transformer_file_with_diffusers_names(small_folder, names, from_folder, put):
    path = put("diffusion_models", "diffusers_names.safetensors")
    tensors = {}
    for shard in sorted((small_folder / "transformer").glob("*.safetensors")):
        tensors |= load_file(shard)
    save_file(tensors, path)
    found = load(path.name, names["text_encoder"], names["vae"])
    assert is_equal(weights(found.model), weights(from_folder.model))


def test_a_file_in_a_subfolder(small_files, names, from_folder, put):
    path = put("vae", "sub/folder/ae.safetensors")
    os.link(small_files["vae"], path)
    found = load(names["transformer"], names["text_encoder"], "sub/folder/ae.safetensors")
    assert is_equal(weights(found.vae), weights(from_folder.vae))


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_weight_dtype_is_what_the_hosts_loader_makes_of_it(
    host, names, tiny_vae, weight_dtype, layout
):
    wanted = host.nodes.UNETLoader().load_unet(names["transformer"], weight_dtype)[0]
    choices = (FOLDER, SAME) if layout == "folder" else list(names.values())[:2]
    got = load(*choices, tiny_vae, weight_dtype=weight_dtype).model
    assert got.model_dtype() == wanted.model_dtype() == DTYPES[weight_dtype]
    assert got.model.manual_cast_dtype == wanted.model.manual_cast_dtype
    assert got.model.model_config.optimizations == wanted.model.model_config.optimizations
    assert got.model_options == wanted.model_options
    assert got.object_patches.keys() == wanted.object_patches.keys() == set()
    assert is_equal(weights(got), weights(wanted))


def test_the_schema_offers_the_hosts_dtypes(host):
    wanted = host.nodes.UNETLoader.INPUT_TYPES()["required"]["weight_dtype"][0]
    offered = {i.id: i for i in node().define_schema().inputs}["weight_dtype"].options
    assert list(offered) == list(wanted) == list(DTYPES)


@pytest.fixture
def schedule(small_folder: Path) -> Iterator[Path]:
    path = small_folder / "scheduler" / "scheduler_config.json"
    before = path.read_text()
    yield path
    path.write_text(before)


@pytest.mark.parametrize("text", ['{"shift": 6.0}', '{"shift": 1}'])
def test_shift_comes_from_the_folder(tiny_vae, schedule, text):
    schedule.write_text(text)
    assert shift_of(load(FOLDER, SAME, tiny_vae).model) == float(text[10:-1])


def test_shift_without_a_schedule_is_3(names, tiny_vae, schedule):
    schedule.unlink()
    assert shift_of(load(FOLDER, SAME, tiny_vae).model) == 3.0
    assert shift_of(load(names["transformer"], names["text_encoder"], tiny_vae).model) == 3.0


def test_shift_of_a_file_ignores_the_folder_of_the_text_encoder(names, tiny_vae, schedule):
    schedule.write_text('{"shift": 6.0}')
    assert shift_of(load(names["transformer"], FOLDER, tiny_vae).model) == 3.0


def test_a_shift_that_is_given_goes_before_the_folders(tiny_vae, schedule):
    schedule.write_text('{"shift": 6.0}')
    assert shift_of(load(FOLDER, SAME, tiny_vae, shift=1.5).model) == 1.5


@pytest.mark.parametrize("shift", [3.0, 4.5])
def test_the_templates_own_shift_node_is_harmless(from_folder, tiny_vae, shift):
    """Behind the loader, ModelSamplingAuraFlow decides, as in the official template."""
    from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow

    wanted = ModelSamplingAuraFlow().patch_aura(from_folder.model, shift)[0]
    got = ModelSamplingAuraFlow().patch_aura(load(FOLDER, SAME, tiny_vae, shift=2.0).model, shift)[
        0
    ]
    assert shift_of(got) == shift_of(wanted) == shift
    sigmas = [m.get_model_object("model_sampling").sigmas for m in (got, wanted)]
    assert torch.equal(*sigmas)
