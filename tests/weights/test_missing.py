"""The sentence on missing files."""

from __future__ import annotations

import pytest
from pack.nodes.weights.diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE
from pack.nodes.weights.missing import PUBLISHED, sentence

FOLDERS = {TRANSFORMER: "diffusion_models", TEXT_ENCODER: "text_encoders", VAE: "vae"}
SOURCE = "from Comfy-Org/z_image_turbo on Hugging Face"
OFFER = "(an example workflow offers the download)"
FOLDER = "or the folder Tongyi-MAI/Z-Image-Turbo for models/diffusers, then press R"


def test_all_three():
    assert sentence(PUBLISHED, FOLDERS) == (
        "Missing: z_image_turbo_bf16.safetensors in models/diffusion_models, "
        "qwen_3_4b.safetensors in models/text_encoders and ae.safetensors in models/vae; "
        f"get them {SOURCE} {OFFER}, {FOLDER}"
    )


def test_one_of_them():
    assert sentence({VAE: "ae.safetensors"}, FOLDERS) == (
        f"Missing: ae.safetensors in models/vae; get it {SOURCE} {OFFER}, then press R"
    )


def test_a_file_of_another_name_is_not_promised():
    names = {TRANSFORMER: "mine.safetensors", TEXT_ENCODER: PUBLISHED[TEXT_ENCODER]}
    assert sentence(names, FOLDERS) == (
        "Missing: mine.safetensors in models/diffusion_models and qwen_3_4b.safetensors in "
        "models/text_encoders; choose what is there, or get z_image_turbo_bf16.safetensors and "
        f"qwen_3_4b.safetensors {SOURCE}, {FOLDER}"
    )


def test_nothing_is_missing():
    with pytest.raises(ValueError, match="must hold a missing file, got none"):
        sentence({}, FOLDERS)
