"""Load Z-Image-Turbo where files are missing: the prompt is accepted, and one sentence answers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack.testing.loading import SAME, load, node

KINDS = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}
INPUTS = dict(zip(KINDS, ("diffusion_model", "text_encoder", "vae"), strict=True))
SAVED = {
    "transformer": "z_image_turbo_bf16.safetensors",
    "text_encoder": "qwen_3_4b.safetensors",
    "vae": "ae.safetensors",
}
NO_FILE = "no file yet"


@pytest.fixture
def models(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty models folder in the place of the host's."""
    known = host.folder_paths.folder_names_and_paths
    for kind in (*KINDS.values(), "diffusers"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(known, kind, ([str(tmp_path / kind)], known[kind][1]))
    host.folder_paths.filename_list_cache.clear()
    return tmp_path


@pytest.fixture
def refused(host: Any) -> Iterator[Any]:
    """What the host says against a prompt with these choices before it runs; [] accepts it."""
    import execution

    from nodes import NODE_CLASS_MAPPINGS

    def ask(*choices: Any) -> list[str]:
        inputs = {**dict(zip(INPUTS.values(), choices, strict=False)), "weight_dtype": "default"}
        prompt = {
            "1": {"class_type": "ZImageTurboLoader", "inputs": {**inputs, "shift": 0.0}},
            "2": {"class_type": "EmptyLatentImage",
                  "inputs": {"width": 64, "height": 64, "batch_size": 1}},
            "3": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0], "vae": ["1", 2]}},
            "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
        }  # fmt: skip
        told = asyncio.run(execution.validate_prompt("missing", prompt, None))
        return [e["details"] for answer in told[3].values() for e in answer["errors"]]

    NODE_CLASS_MAPPINGS["ZImageTurboLoader"] = node()
    yield ask
    del NODE_CLASS_MAPPINGS["ZImageTurboLoader"]


def sentence(*choices: str | None) -> str:
    with pytest.raises(FileNotFoundError) as info:
        load(*choices)
    return str(info.value)


def test_a_new_node_without_any_file(models, refused):
    inputs = {i.id: i for i in node().define_schema().inputs}
    values = [inputs[name].default for name in INPUTS.values()]
    assert values == [NO_FILE, SAME, SAME]
    assert all(inputs[name].default in inputs[name].options for name in INPUTS.values())
    assert refused(*values) == []
    said = sentence(*values)
    assert said.startswith("Missing: ")
    for part, name in SAVED.items():
        assert f"{name} in models/{KINDS[part]}" in said


def test_a_saved_workflow_without_any_file(models, refused):
    assert refused(*SAVED.values()) == []
    assert sentence(*SAVED.values()) == sentence(NO_FILE, SAME, SAME)


@pytest.mark.parametrize("missing", KINDS)
def test_one_file_is_missing(models, refused, missing):
    for part, kind in KINDS.items():
        if part != missing:
            (models / kind / SAVED[part]).touch()
    assert refused(*SAVED.values()) == []
    said = sentence(*SAVED.values())
    assert said.startswith(
        f"Missing: {SAVED[missing]} in models/{KINDS[missing]}; get it from Comfy-Org/"
    )
    assert [name for part, name in SAVED.items() if part != missing and name in said] == []


def test_files_that_are_there_are_opened(models):
    for part, kind in KINDS.items():
        (models / kind / SAVED[part]).write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"z_image_turbo_bf16\.safetensors"):
        load(*SAVED.values())


@pytest.mark.parametrize("part", KINDS)
def test_the_saved_name_is_not_the_users(models, refused, part):
    choices = {**SAVED, part: "sub/gone.safetensors"}
    for other, kind in KINDS.items():
        (models / kind / SAVED[other]).touch()
    assert refused(*choices.values()) == []
    said = sentence(*choices.values())
    assert f"sub/gone.safetensors in models/{KINDS[part]}; choose what is there" in said
    assert f"or get {SAVED[part]} from Comfy-Org/z_image_turbo" in said


def test_no_file_is_no_folder(models):
    """The encoder and VAE of "the same folder" are missing with the transformer."""
    (models / "vae" / SAVED["vae"]).touch()
    said = sentence(SAVED["transformer"], SAME, SAVED["vae"])
    assert said.startswith(
        "Missing: z_image_turbo_bf16.safetensors in models/diffusion_models and "
    )
    assert "qwen_3_4b.safetensors in models/text_encoders; get them" in said


def test_a_node_that_is_older_than_its_file(models):
    """It was added to an empty models folder, then the files came."""
    for part, kind in KINDS.items():
        (models / kind / SAVED[part]).touch()
    assert sentence(NO_FILE, SAME, SAME) == (
        "diffusion_model is 'no file yet', but there are files now: press R, then choose one"
    )


def test_a_node_that_is_older_than_its_folder(models):
    """Whose files have names of their own."""
    (models / "diffusers" / "Z-Image-Turbo" / "transformer").mkdir(parents=True)
    (models / "vae" / SAVED["vae"]).touch()
    assert sentence(NO_FILE, SAME, SAME) == (
        "diffusion_model is 'no file yet', but there are files now: press R, then choose one"
    )
    said = sentence(SAVED["transformer"], SAME, SAME)
    assert "; choose Z-Image-Turbo/, or get them from Comfy-Org/" in said


def test_a_file_that_is_there_in_another_folder(models):
    for part, kind in KINDS.items():
        (models / kind / "sub").mkdir()
        (models / kind / ("sub" if part == "text_encoder" else "") / SAVED[part]).touch()
    there = f"sub{os.sep}qwen_3_4b.safetensors"
    assert f"in models/text_encoders; choose {there}, or get it" in sentence(*SAVED.values())


def test_a_folder_that_is_gone_and_a_file(models, refused):
    (models / "vae" / SAVED["vae"]).touch()
    choices = ("gone/", "gone.safetensors", SAVED["vae"])
    assert refused(*choices) == []
    assert sentence(*choices).startswith(
        "Missing: gone/ in models/diffusers and gone.safetensors in models/text_encoders; "
    )
    assert "qwen" not in sentence("gone/", SAME, SAVED["vae"]).partition(";")[0]


def test_a_file_that_is_there_is_not_called_missing(models):
    (models / "vae" / SAVED["vae"]).touch()
    assert "ae.safetensors" not in sentence(NO_FILE, SAME, SAME)


def test_an_empty_name_is_a_missing_file(models):
    assert sentence("", SAME, SAME) == sentence(NO_FILE, SAME, SAME)


@pytest.mark.parametrize("part", KINDS)
@pytest.mark.parametrize("choice", [None, "", NO_FILE, SAME])
def test_nothing_is_chosen_and_files_are_there(models, part, choice):
    for other, kind in KINDS.items():
        (models / kind / SAVED[other]).touch()
    if choice == SAME and part != "transformer":
        with pytest.raises(ValueError, match=f"{part} is 'from the same folder', but diffusion_"):
            load(*{**SAVED, part: choice}.values())
        return
    said = sentence(*{**SAVED, part: choice}.values())
    assert said == (
        f"{INPUTS[part]} is {choice or ''!r}, but there are files now: press R, then choose one"
    )


def test_what_is_no_name_is_refused_before_the_run(models, refused):
    told = refused(SAVED["transformer"], 7, SAVED["vae"])
    assert told
    assert all("text_encoder must be a file or folder, got 7" in text for text in told)


def test_an_input_that_the_prompt_lacks_is_refused_by_the_host(models, refused):
    assert refused(*list(SAVED.values())[:2]) == ["vae"]


def test_a_change_is_looked_for_without_a_fault(models):
    """The host logs what this raises, besides what the run says."""
    look = node().fingerprint_inputs
    assert look(*SAVED.values()) == look(None, None, None) == look("gone/", SAME, SAME) == []
    for part, kind in KINDS.items():
        (models / kind / SAVED[part]).touch()
    assert len(look(*SAVED.values())) == 3
