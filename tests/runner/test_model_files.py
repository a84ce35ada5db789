"""Finding Z-Image-Turbo's parts in a folder, for --models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pack.runner import folder_links
from pack.runner.environment import SetupError
from pack.runner.folder_links import PACK_NAME, install_pack, link_folder, unlink_folder
from pack.runner.model_files import SAME_FOLDER, offer_models

NAMES = ("z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A ComfyUI models folder with small weights in both layouts."""
    from pack.testing import tiny_models

    root = tmp_path_factory.mktemp("written")
    folder = tiny_models.write_small_folder(root / "diffusers" / "Z-Image-Turbo")
    tiny_models.write_single_files(folder, root)
    return root


@pytest.fixture
def models_dir(written, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(written, tmp_path / "user" / "models"))


def seen(models, kind: str) -> set[str]:
    """What the host would list for a kind under the search path that it is given."""
    root = Path(json.loads(models.paths_file.read_text())["z_image"][kind])
    if kind == "diffusers":
        return {f"{path.name}/" for path in root.iterdir()}
    return {str(path.relative_to(root)) for path in root.rglob("*.safetensors")}


def test_a_comfyui_models_folder_gives_single_files_first(models_dir, tmp_path):
    models = offer_models(models_dir, tmp_path / "base")
    assert models[:3] == NAMES
    for kind, name in zip(("diffusion_models", "text_encoders", "vae"), NAMES, strict=True):
        assert name in seen(models, kind)
    assert seen(models, "diffusers") == {"Z-Image-Turbo/"}


def test_a_whole_comfyui_folder_is_understood(models_dir, tmp_path):
    assert offer_models(models_dir.parent, tmp_path / "base")[:3] == NAMES


def test_without_single_files_the_diffusers_folder_is_taken(models_dir, tmp_path):
    for kind in ("diffusion_models", "text_encoders", "vae"):
        shutil.rmtree(models_dir / kind)
    models = offer_models(models_dir, tmp_path / "base")
    assert models[:3] == ("Z-Image-Turbo/", SAME_FOLDER, SAME_FOLDER)


def test_a_missing_file_is_taken_from_the_diffusers_folder(models_dir, tmp_path):
    (models_dir / "text_encoders" / NAMES[1]).unlink()
    models = offer_models(models_dir, tmp_path / "base")
    assert models[:3] == (NAMES[0], "Z-Image-Turbo/", NAMES[2])


def test_a_downloaded_diffusers_folder_is_linked_and_not_copied(models_dir, tmp_path):
    folder = models_dir / "diffusers" / "Z-Image-Turbo"
    models = offer_models(folder, tmp_path / "base")
    assert models[:3] == ("Z-Image-Turbo/", SAME_FOLDER, SAME_FOLDER)
    assert seen(models, "diffusers") == {"Z-Image-Turbo/"}
    link = tmp_path / "base" / "linked" / "diffusers" / "Z-Image-Turbo"
    assert link.resolve() == folder.resolve()


def test_loose_files_are_told_apart_by_their_tensors(models_dir, tmp_path):
    flat = tmp_path / "flat"
    (flat / "deeper").mkdir(parents=True)
    kinds = ("diffusion_models", "text_encoders", "vae")
    for new, kind, name in zip(("a", "b", "c"), kinds, NAMES, strict=True):
        shutil.copy(models_dir / kind / name, flat / "deeper" / f"{new}.safetensors")
    (flat / "broken.safetensors").write_bytes(b"\xff" * 20)
    models = offer_models(flat, tmp_path / "base")
    expected = [str(Path("deeper") / f"{new}.safetensors") for new in ("a", "b", "c")]
    assert list(models[:3]) == expected
    for kind, name in zip(kinds, expected, strict=True):
        assert name in seen(models, kind)


def test_of_several_models_the_turbo_is_taken(models_dir, tmp_path):
    for name in ("a_z_image_base.safetensors", "zz.safetensors"):
        shutil.copy(
            models_dir / "diffusion_models" / NAMES[0], models_dir / "diffusion_models" / name
        )
    assert offer_models(models_dir, tmp_path / "base").diffusion_model == NAMES[0]


def test_what_is_missing_is_named(models_dir, tmp_path):
    shutil.rmtree(models_dir / "diffusers")
    (models_dir / "vae" / NAMES[2]).unlink()
    with pytest.raises(SetupError, match=r"no safetensors file of its VAE \(ae\.safetensors\)$"):
        offer_models(models_dir, tmp_path / "base")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_anything_is_one_sentence(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SetupError) as raised:
        offer_models(tmp_path / name, tmp_path / "base")
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


class TestLinks:
    def test_a_link_is_moved_and_ended_without_touching_what_it_leads_to(self, tmp_path):
        link = tmp_path / "links" / "x"
        for name in ("one", "two", "two"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "file").write_text(name)
            link_folder(tmp_path / name, link)
            assert (link / "file").read_text() == name
        unlink_folder(link)
        assert not link.exists()
        assert [(tmp_path / name / "file").read_text() for name in ("one", "two")] == ["one", "two"]

    def test_where_links_are_refused_the_runtime_files_are_copied(self, tmp_path, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise OSError("no links here")

        pack_dir = tmp_path / "pack"
        for name in ("nodes/a.py", "js/b.js", "tests/c.py", ".venv/d", "__init__.py"):
            (pack_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (pack_dir / name).write_text(name)
        monkeypatch.setattr(Path, "symlink_to", refuse)
        monkeypatch.setattr(folder_links.subprocess, "run", refuse)
        for _ in range(2):  # a second start replaces the copy
            place = install_pack(pack_dir, tmp_path / "base")
            copied = {p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()}
            assert copied == {"nodes/a.py", "js/b.js", "__init__.py"}
        assert place == tmp_path / "base" / "custom_nodes" / PACK_NAME
