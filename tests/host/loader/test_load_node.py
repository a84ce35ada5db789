"""What the page and the executor see of the loader node: its schema, its text, its fingerprint."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pack.testing.loading import (
    FOLDER,
    SAME,
    Scratch,
    copy_folder,
    load,
    node,
    replace_file,
    write_tiny_vae,
)
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def names(small_files: dict[str, Path]) -> dict[str, str]:
    return {part: path.name for part, path in small_files.items()}


@pytest.fixture(scope="module")
def tiny_vae(host) -> Iterator[str]:
    path = write_tiny_vae(host)
    yield path.name
    path.unlink()


@pytest.fixture
def put(host) -> Iterator[Scratch]:
    scratch = Scratch(host.models_dir)
    yield scratch
    scratch.clear()


@pytest.fixture
def broken(put: Scratch, small_folder: Path) -> Path:
    """A copy of the folder, to break."""
    return copy_folder(small_folder, put("diffusers", "Broken"))


def test_schema(names, small_folder):
    schema = node().define_schema()
    assert (schema.node_id, schema.display_name) == ("ZImageTurboLoader", "Load Z-Image-Turbo")
    assert schema.category == "model/loaders"
    assert schema.description
    for slot in [*schema.inputs, *schema.outputs]:
        assert slot.tooltip and slot.tooltip.endswith("."), slot
    assert [output.io_type for output in schema.outputs] == ["MODEL", "CLIP", "VAE"]
    inputs = {i.id: i for i in schema.inputs}
    assert list(inputs) == list(inspect.signature(node().execute).parameters)
    for part, name in zip(["diffusion_model", "text_encoder", "vae"], names.values(), strict=True):
        options = inputs[part].options
        assert {name, FOLDER} <= set(options)
        assert (SAME in options) == (options[0] == SAME) == (part != "diffusion_model")
    assert inputs["diffusion_model"].default == names["transformer"]
    assert inputs["text_encoder"].default == names["text_encoder"]
    assert inputs["vae"].default == names["vae"]
    assert inputs["shift"].default == 0.0


def test_the_answer_of_the_node_has_text_on_what_was_loaded(names, tiny_vae, caplog):
    with caplog.at_level("INFO", logger="pack.nodes.load_model"):
        load(
            names["transformer"],
            names["text_encoder"],
            tiny_vae,
            weight_dtype="fp8_e5m2",
            shift=2.5,
        )
    assert caplog.messages == [
        "Loaded Z-Image-Turbo, 2 layers, float8_e5m2 · a Qwen3 of width 64, 3 layers · shift 2.5"
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("z_image_base_bf16.safetensors", "Z-Image-Base"),
        ("z_image_edit.safetensors", "Z-Image-Edit"),
        ("z-image-omni.safetensors", "Z-Image-Omni"),
        ("z_image.safetensors", "Z-Image"),
    ],
)
def test_other_variants_are_accepted_and_named(
    names, tiny_vae, put, small_files, caplog, name, says
):
    os.link(small_files["transformer"], put("diffusion_models", name))
    with caplog.at_level("INFO", logger="pack.nodes.load_model"):
        load(name, names["text_encoder"], tiny_vae)
    assert caplog.messages[-1].startswith(f"Loaded {says}, 2 layers, ")


def test_omni_is_named_by_its_tensors(names, tiny_vae, put, small_files, caplog):
    tensors = load_file(small_files["transformer"])
    tensors["siglip_embedder.0.weight"] = torch.ones(96)
    tensors["siglip_embedder.1.weight"] = torch.zeros(384, 96)
    tensors["siglip_embedder.1.bias"] = torch.zeros(384)
    save_file(tensors, put("diffusion_models", "x.safetensors"))
    with caplog.at_level("INFO", logger="pack.nodes.load_model"):
        load("x.safetensors", names["text_encoder"], tiny_vae)
    assert caplog.messages[-1].startswith("Loaded Z-Image-Omni, 2 layers, ")


def fingerprint(*choices: str) -> list:
    return node().fingerprint_inputs(*choices, weight_dtype="default", shift=0.0)


def test_the_node_runs_again_when_a_chosen_file_changes_and_not_otherwise(names, small_files):
    before = fingerprint(*names.values())
    assert len(before) == 3
    for path in small_files.values():
        path.read_bytes()
    assert fingerprint(*names.values()) == before
    for path in small_files.values():
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))
        assert fingerprint(*names.values()) != before
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert fingerprint(*names.values()) == before


def test_the_node_runs_again_when_a_file_of_a_chosen_part_changes(names, broken):
    choices = ("Broken/", SAME, names["vae"])
    before = fingerprint(*choices)
    replace_file(broken / "vae" / "config.json", "{ }")  # not chosen
    assert fingerprint(*choices) == before
    for name in (
        "transformer/config.json",
        "text_encoder/model.safetensors.index.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ):
        replace_file(broken / name, (broken / name).read_bytes() + b" ")
        assert fingerprint(*choices) != before, name
        before = fingerprint(*choices)
    next((broken / "transformer").glob("*.safetensors")).unlink()
    assert fingerprint(*choices) != before
