"""What the node cannot load gets one sentence, before the host is asked to load anything."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing import fake_files
from pack.testing.loading import (
    FOLDER,
    SAME,
    Scratch,
    copy_folder,
    load,
    replace_file,
    write_tiny_vae,
)

CHOOSE = "choose z_image_turbo_bf16.safetensors or a folder of Z-Image-Turbo"
LOADERS = {
    "load_diffusion_model",
    "load_diffusion_model_state_dict",
    "load_clip",
    "load_text_encoder_state_dicts",
    "load_torch_file",
    "VAE.__init__",
}


@pytest.fixture(scope="module")
def names(small_files: dict[str, Path]) -> dict[str, str]:
    return {part: path.name for part, path in small_files.items()}


@pytest.fixture
def put(host) -> Iterator[Scratch]:
    scratch = Scratch(host.models_dir)
    yield scratch
    scratch.clear()


@pytest.fixture
def broken(put: Scratch, small_folder: Path) -> Path:
    """A copy of the folder, to break."""
    return copy_folder(small_folder, put("diffusers", "Broken"))


def loaders_reached(action: Callable[[], Any]) -> set[str]:
    """Which of the host's loading functions an action calls: watched, not replaced."""
    reached: set[str] = set()

    def watch(frame, event, _argument) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.endswith(("comfy/sd.py", "comfy/utils.py")):
            owner = frame.f_locals.get("self")
            is_init = code.co_name == "__init__"
            reached.add(f"{type(owner).__name__}.__init__" if is_init else code.co_name)

    sys.setprofile(watch)
    try:
        action()
    finally:
        sys.setprofile(None)
    return reached & LOADERS


def refusal(*choices: str, error: type[Exception] | None = None) -> str:
    """The sentence with which the node ends; the host's loaders are not reached."""
    from pack.nodes.weights.header import WeightsError

    caught: list[str] = []

    def action() -> None:
        with pytest.raises(error or WeightsError) as info:
            load(*choices)
        caught.append(str(info.value))

    assert loaders_reached(action) == set()
    assert caught[0].isprintable()
    return caught[0]


def test_the_loaders_are_reached_where_nothing_is_wrong(host, names, small_folder):
    """Shows that the watching below sees what it should not see."""
    vae = write_tiny_vae(host)
    wanted = {"load_torch_file", "VAE.__init__", "load_text_encoder_state_dicts"}
    wanted.add("load_diffusion_model_state_dict")
    assert loaders_reached(lambda: load(FOLDER, SAME, vae.name)) == wanted
    files = loaders_reached(lambda: load(names["transformer"], names["text_encoder"], vae.name))
    assert files == LOADERS
    vae.unlink()


FAMILIES = {
    "Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "img_in.weight": (8, 64)},
    "Stable Diffusion XL": {
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (8, 2816),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    },
    "Stable Diffusion 3": {
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (8, 8)
    },
    "Lumina 2": {
        "cap_embedder.1.weight": (2304, 2304),
        "noise_refiner.0.attention.k_norm.weight": (96,),
        "noise_refiner.0.adaLN_modulation.1.weight": (8, 8),
    },
    "a LoRA": {
        "diffusion_model.layers.0.attention.to_q.lora_A.weight": (4, 8),
        "diffusion_model.layers.0.attention.to_q.lora_B.weight": (8, 4),
    },
    "a text encoder (Qwen3-4B)": fake_files.qwen3_shapes(width=2560),
    "a VAE": fake_files.vae_shapes(),
}


@pytest.mark.parametrize("looks_like", FAMILIES)
def test_a_transformer_of_another_family(names, put, looks_like):
    fake_files.write_file(put("diffusion_models", "fake.safetensors"), FAMILIES[looks_like])
    assert refusal("fake.safetensors", names["text_encoder"], names["vae"]) == (
        f"fake.safetensors is not Z-Image: it looks like {looks_like}: {CHOOSE}"
    )


def test_a_text_encoder_of_another_width(names, put):
    shapes = fake_files.qwen3_shapes(width=4096)
    fake_files.write_file(put("text_encoders", "qwen_3_8b.safetensors"), shapes)
    assert refusal(names["transformer"], "qwen_3_8b.safetensors", names["vae"]) == (
        "qwen_3_8b.safetensors is Qwen3-8B, 4096 channels wide, this Z-Image reads 64 channels "
        "(a Qwen3 of width 64): choose a text encoder of that width"
    )


@pytest.mark.parametrize("transformer", [FOLDER, "file"])
def test_a_vae_with_4_latent_channels(names, put, transformer):
    shapes = fake_files.vae_shapes(latent_channels=4)
    fake_files.write_file(put("vae", "sd.safetensors"), shapes)
    model = names["transformer"] if transformer == "file" else transformer
    assert refusal(model, names["text_encoder"], "sd.safetensors") == (
        "sd.safetensors has 4 latent channels, Z-Image needs 16: "
        "choose ae.safetensors (the VAE of Flux)"
    )


def test_components_in_each_others_place(names, put, small_files):
    for kind in ("text_encoders", "vae"):
        os.link(small_files["transformer"], put(kind, "z.safetensors"))
    assert refusal(names["transformer"], "z.safetensors", names["vae"]) == (
        "z.safetensors is not the text encoder of Z-Image: it looks like Z-Image: "
        "choose qwen_3_4b.safetensors"
    )
    assert refusal(names["transformer"], names["text_encoder"], "z.safetensors") == (
        "z.safetensors is not the VAE of Z-Image: it looks like Z-Image: choose ae.safetensors"
    )


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_the_same_folder_of_a_file(names, part):
    choices = {**names, part: SAME}
    assert refusal(*choices.values()) == (
        f"{part} is 'from the same folder', but diffusion_model is the file "
        f"{names['transformer']}: choose a file for {part}, or a folder for diffusion_model"
    )


def test_files_of_one_name_in_different_folders(put, small_files):
    """diffusion_models/model.safetensors and vae/model.safetensors are two files."""
    kinds = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
    for part, kind in kinds.items():
        os.link(small_files[part], put(kind, "model.safetensors"))
    assert load("model.safetensors", "model.safetensors", "model.safetensors")


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_folder_that_lacks_a_part(names, broken, part):
    shutil.rmtree(broken / part)
    assert refusal("Broken/", SAME, SAME) == (
        f"Broken/ holds no {part}/: download it, or choose a file for that component"
    )


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_an_empty_part(broken, part):
    shutil.rmtree(broken / part)
    (broken / part).mkdir()
    assert refusal("Broken/", SAME, SAME) == (
        f"Broken/{part}/ holds no .safetensors file: download the folder again"
    )


def test_a_folder_that_is_not_there(names):
    with pytest.raises(FileNotFoundError, match=r"^Missing: Gone/ in models/diffusers; choose "):
        load("Gone/", names["text_encoder"], names["vae"])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-of-*.safetensors"))


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_missing_shard(broken, part):
    shard = shards(broken / part)[-1]
    shard.unlink()
    index = next((broken / part).glob("*.index.json"))
    assert refusal("Broken/", SAME, SAME) == (
        f"Broken/{part}/ lacks the shard {shard.name}, which {index.name} names: "
        "download that shard"
    )


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_truncated_shard(broken, part):
    shard = shards(broken / part)[0]
    whole = shard.read_bytes()
    replace_file(shard, whole[:-1000])
    assert refusal("Broken/", SAME, SAME) == (
        f"{shard.name} is truncated: its header describes {len(whole)} bytes, the file has "
        f"{len(whole) - 1000} bytes: download it again"
    )


def test_an_index_that_names_a_tensor_no_shard_has(broken):
    path = next((broken / "transformer").glob("*.index.json"))
    index = json.loads(path.read_text())
    shard = index["weight_map"]["layers.0.attention.to_q.weight"]
    index["weight_map"]["layers.9.attention.to_q.weight"] = shard
    replace_file(path, json.dumps(index))
    assert refusal("Broken/", SAME, SAME) == (
        f"Broken/transformer/{path.name} says that layers.9.attention.to_q.weight is in {shard}, "
        "which does not hold it: index and shards are of different downloads: "
        "download the folder again"
    )


def test_a_folder_whose_last_layer_lacks_a_tensor(broken):
    path = next((broken / "transformer").glob("*.index.json"))
    index = json.loads(path.read_text())
    del index["weight_map"]["layers.1.attention.to_k.weight"]
    replace_file(path, json.dumps(index))
    assert refusal("Broken/", SAME, SAME) == (
        "Broken/transformer/ lacks the tensor layers.1.attention.to_k.weight: download it again"
    )


def test_a_schedule_that_makes_no_sense(broken):
    replace_file(broken / "scheduler" / "scheduler_config.json", '{"shift": -3}')
    assert refusal("Broken/", SAME, SAME) == (
        "scheduler/scheduler_config.json: shift must be in (0, 100], got -3"
    )


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_pickle(names, put, part):
    kinds = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
    for name in ("x.safetensors", "x.ckpt"):
        torch.save({"a": torch.zeros(1)}, put(kinds[part], name))
        assert refusal(*{**names, part: name}.values()) == (
            f"{name} is a pickle file, which can run code when it is opened: "
            "use a .safetensors file"
        )


def test_an_unreadable_file(names, put, small_files):
    if not hasattr(os, "geteuid") or os.geteuid() == 0:
        pytest.skip("permissions do not bind this user (root, or Windows)")
    path = put("vae", "locked.safetensors")
    shutil.copy(small_files["vae"], path)
    path.chmod(0)
    assert refusal(names["transformer"], names["text_encoder"], path.name).startswith(
        "locked.safetensors cannot be read ("
    )
