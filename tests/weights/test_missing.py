"""The sentence on missing files."""

from __future__ import annotations

import pytest
from pack.nodes.weights.diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE
from pack.nodes.weights.missing import PUBLISHED, sentence

FOLDERS = {TRANSFORMER: "diffusion_models", TEXT_ENCODER: "text_encoders", VAE: "vae"}
SOURCE = "from Comfy-Org/z_image_turbo on Hugging Face"
FOLDER = "or the folder Tongyi-MAI/Z-Image-Turbo for models/diffusers, then press R"


def test_all_three():
    assert sentence(PUBLISHED, FOLDERS) == (
        "Missing: z_image_turbo_bf16.safetensors in models/diffusion_models, "
        "qwen_3_4b.safetensors in models/text_encoders and ae.safetensors in models/vae; "
        f"get them {SOURCE}, {FOLDER}"
    )


def test_one_of_them():
    assert sentence({VAE: "ae.safetensors"}, FOLDERS) == (
        f"Missing: ae.safetensors in models/vae; get it {SOURCE}, then press R"
    )


def test_a_file_of_another_name_is_not_promised():
    names = {TRANSFORMER: "mine.safetensors", TEXT_ENCODER: PUBLISHED[TEXT_ENCODER]}
    missing = (
        "Missing: mine.safetensors in models/diffusion_models and qwen_3_4b.safetensors in "
        "models/text_encoders; {}, or get z_image_turbo_bf16.safetensors and "
        f"qwen_3_4b.safetensors {SOURCE}, {FOLDER}"
    )
    assert sentence(names, FOLDERS) == missing.format("put them there")
    some = {TRANSFORMER: ["other.safetensors"], TEXT_ENCODER: []}
    assert sentence(names, FOLDERS, some) == missing.format("put them there")
    both = {TRANSFORMER: ["other.safetensors"], TEXT_ENCODER: ["other.safetensors"]}
    assert sentence(names, FOLDERS, both) == missing.format("choose what is there")


@pytest.mark.parametrize("there", ["qwen/qwen_3_4b.safetensors", "qwen\\qwen_3_4b.safetensors"])
def test_the_same_file_in_another_folder_is_named(there):
    names = {TEXT_ENCODER: PUBLISHED[TEXT_ENCODER]}
    assert sentence(names, FOLDERS, {TEXT_ENCODER: ["other.safetensors", there]}) == (
        f"Missing: qwen_3_4b.safetensors in models/text_encoders; choose {there}, "
        f"or get it {SOURCE}, then press R"
    )


def test_the_published_folder_that_is_there_is_named():
    there = {part: ["Z-Image-Turbo/"] for part in PUBLISHED}
    assert sentence(PUBLISHED, FOLDERS, there).endswith(
        f"ae.safetensors in models/vae; choose Z-Image-Turbo/, or get them {SOURCE}, then press R"
    )


def test_a_folder_of_another_name():
    names = {TRANSFORMER: "gone/", VAE: "ae.safetensors"}
    assert sentence(names, FOLDERS).startswith(
        "Missing: gone/ in models/diffusers and ae.safetensors in models/vae; put them there, "
    )


def test_nothing_is_missing():
    with pytest.raises(ValueError, match="must hold a missing file, got none"):
        sentence({}, FOLDERS)
