"""The random weights of the campaign: every matrix at its scale, every vector as it was."""

from __future__ import annotations

import pytest
import torch
from pack.benchmarks.card import files
from safetensors.torch import load_file, save_file


@pytest.fixture
def filled(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(files, "_BLOCK", 2**12)  # so that every matrix repeats it
    path = tmp_path / "some.safetensors"
    shapes = {
        "layers.0.w1.weight": (256, 400), "layers.0.norm.weight": (400,),
        "model.embed_tokens.weight": (500, 64), "decoder.conv_in.weight": (96, 16, 3, 3),
        files.LAST_LAYER: (3, 128, 3, 3),
    }  # fmt: skip
    save_file({name: torch.ones(shape).bfloat16() for name, shape in shapes.items()}, path)
    files.fill(path)
    return load_file(path)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("layers.0.w1.weight", 400**-0.5),
        ("model.embed_tokens.weight", 1.0),
        ("decoder.conv_in.weight", (16 * 9) ** -0.5),
        (files.LAST_LAYER, files.CONTRAST * (128 * 9) ** -0.5),
    ],
)
def test_a_matrix_keeps_the_scale_of_what_goes_through(filled, name, std):
    values = filled[name].float()
    assert values.std() == pytest.approx(std, rel=0.05)
    assert values.mean().abs() < 0.05 * std
    assert values.flatten()[-1] != 1  # to its end


def test_a_vector_stays(filled):
    assert (filled["layers.0.norm.weight"] == 1).all()


def test_another_type_is_refused(tmp_path):
    save_file({"w.weight": torch.ones(4, 4)}, tmp_path / "f32.safetensors")
    with pytest.raises(ValueError, match=r"f32\.safetensors: w\.weight must be BF16, got F32"):
        files.fill(tmp_path / "f32.safetensors")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(files._NEEDED_BYTES, "whole", 2**60)
    with pytest.raises(OSError, match="name another folder with --out"):
        files._check_space(tmp_path, files._NEEDED_BYTES["whole"])
