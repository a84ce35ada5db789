"""A diffusers-layout folder: where it is found, its parts, its schedule, and its changes."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from pack.nodes.weights import diffusers_folder
from pack.nodes.weights.diffusers_folder import (
    MAX_DEPTH,
    files_of,
    find_folders,
    fingerprint,
    open_part,
    pipeline_class,
    scheduler_shift,
)
from pack.nodes.weights.header import WeightsError
from pack.testing.fake_files import write_shards


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_finds_a_folder_by_any_of_its_parts(tmp_path, part):
    make(tmp_path, f"Z-Image-Turbo/{part}", "other/unet", "empty")
    assert find_folders([tmp_path]) == {"Z-Image-Turbo/": tmp_path / "Z-Image-Turbo"}


def test_finds_folders_in_folders(tmp_path):
    make(tmp_path, "a/b/c/transformer", "a/d/vae", "e/transformer")
    assert set(find_folders([tmp_path])) == {"a/b/c/", "a/d/", "e/"}


def test_looks_no_deeper_than_the_bound(tmp_path):
    deep = "/".join("abcdefgh"[:MAX_DEPTH])
    make(tmp_path, f"{deep}/transformer", f"x/{deep}/transformer")
    assert set(find_folders([tmp_path])) == {f"{deep}/"}


def test_does_not_look_into_a_found_folder(tmp_path):
    make(tmp_path, "m/transformer/vae", "m/old/transformer")
    assert set(find_folders([tmp_path])) == {"m/"}


def test_passes_over_hidden_folders(tmp_path):
    make(tmp_path, ".cache/m/transformer", "a/.git/m/vae")
    assert find_folders([tmp_path]) == {}


def test_the_search_path_itself_is_no_model(tmp_path):
    make(tmp_path, "transformer", "vae", "m/vae")
    assert set(find_folders([tmp_path])) == {"m/"}


def test_the_first_search_path_wins(tmp_path):
    make(tmp_path, "one/m/vae", "two/m/vae", "two/n/vae")
    found = find_folders([tmp_path / "one", tmp_path / "two"])
    assert found == {"m/": tmp_path / "one" / "m", "n/": tmp_path / "two" / "n"}


def test_a_search_path_that_does_not_exist(tmp_path):
    make(tmp_path, "two/m/vae")
    assert set(find_folders([tmp_path / "one", tmp_path / "two"])) == {"m/"}


def test_a_file_named_like_a_part_is_no_part(tmp_path):
    make(tmp_path, "m")
    (tmp_path / "m" / "transformer").touch()
    assert find_folders([tmp_path]) == {}


def test_follows_links_to_folders(tmp_path):
    make(tmp_path, "disk/m/transformer", "models")
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "disk" / "m")
    assert set(find_folders([tmp_path / "models"])) == {"linked/"}


def test_links_in_a_circle_come_to_an_end(tmp_path):
    make(tmp_path, "m/transformer", "a/b")
    for name in ("up", "a/up", "a/b/up"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    start = time.thread_time()
    found = find_folders([tmp_path])
    assert time.thread_time() - start < 1
    assert found["m/"] == tmp_path / "m"
    assert all(len(Path(name).parts) <= MAX_DEPTH for name in found)


def test_order_does_not_depend_on_the_disk(tmp_path):
    make(tmp_path, *(f"{name}/vae" for name in "dbeac"))
    assert list(find_folders([tmp_path])) == ["a/", "b/", "c/", "d/", "e/"]


def test_opens_a_part(tmp_path):
    write_shards(tmp_path / "transformer", [{"a": (2,)}, {"b": (3,)}])
    found = open_part(tmp_path, "M/", "transformer")
    assert found.label == "M/transformer/"
    assert set(found.tensors) == {"a", "b"}


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_a_missing_part(tmp_path, part):
    with pytest.raises(WeightsError) as caught:
        open_part(tmp_path, "M/", part)
    assert str(caught.value) == (
        f"M/ holds no {part}/: download it, or choose a file for that component"
    )


def test_an_empty_part(tmp_path):
    make(tmp_path, "vae")
    with pytest.raises(WeightsError) as caught:
        open_part(tmp_path, "M/", "vae")
    assert str(caught.value) == ("M/vae/ holds no .safetensors file: download the folder again")


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(("shift", "wanted"), [(3.0, 3.0), (6, 6.0), (0.01, 0.01), (100, 100.0)])
def test_shift(tmp_path, shift, wanted):
    write_json(tmp_path / SCHEDULER, {"_class_name": "X", "shift": shift})
    assert scheduler_shift(tmp_path) == wanted


@pytest.mark.parametrize("config", [None, {}, {"shift": None}], ids=repr)
def test_no_shift(tmp_path, config):
    if config is not None:
        write_json(tmp_path / SCHEDULER, config)
    assert scheduler_shift(tmp_path) is None


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("0", "0"),
        ("-1", "-1"),
        ("100.5", "100.5"),
        ("1e999", "inf"),
        ("NaN", "nan"),
        ("true", "True"),
        ('"3.0"', "'3.0'"),
        ("[3]", "[3]"),
    ],
)
def test_a_shift_that_is_none(tmp_path, raw, shown):
    write_json(tmp_path / SCHEDULER, f'{{"shift": {raw}}}')
    with pytest.raises(WeightsError) as caught:
        scheduler_shift(tmp_path)
    assert str(caught.value) == (
        f"scheduler/scheduler_config.json: shift must be in (0, 100], got {shown}"
    )


def test_a_schedule_that_is_no_json(tmp_path):
    write_json(tmp_path / SCHEDULER, "{")
    with pytest.raises(
        WeightsError, match=r"^scheduler/scheduler_config\.json is not valid JSON \("
    ):
        scheduler_shift(tmp_path)


def test_pipeline_class(tmp_path):
    assert pipeline_class(tmp_path) == ""
    write_json(tmp_path / "model_index.json", {})
    assert pipeline_class(tmp_path) == ""
    write_json(tmp_path / "model_index.json", {"_class_name": "ZImagePipeline"})
    assert pipeline_class(tmp_path) == "ZImagePipeline"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "m"
    for part in ("transformer", "vae"):
        write_shards(folder / part, [{"a": (2,)}, {"b": (3,)}])
        write_json(folder / part / "config.json", {"dim": 1})
    write_json(folder / SCHEDULER, {"shift": 3.0})
    write_json(folder / "model_index.json", {})
    return folder


def mark(folder: Path) -> list:
    return fingerprint(files_of(folder, "transformer"))


def touch(path: Path, *, seconds: float = 5.0) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9)))


DECIDING = [
    "transformer/model-00002-of-00002.safetensors",
    "transformer/model.safetensors.index.json",
    "transformer/config.json",
    SCHEDULER,
    "model_index.json",
]


def test_the_same_files_have_the_same_fingerprint(model):
    before = mark(model)
    assert len(before) == 6
    for path in model.rglob("*"):
        if path.is_file():
            path.read_bytes()
    assert mark(model) == before


@pytest.mark.parametrize("name", DECIDING)
def test_a_newer_file_changes_the_fingerprint(model, name):
    before = mark(model)
    touch(model / name, seconds=1e-6)
    assert mark(model) != before


@pytest.mark.parametrize("name", DECIDING)
def test_a_longer_file_of_the_same_time_changes_the_fingerprint(model, name):
    before = mark(model)
    stat = (model / name).stat()
    with (model / name).open("ab") as file:
        file.write(b" ")
    os.utime(model / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert mark(model) != before


@pytest.mark.parametrize("name", DECIDING)
def test_a_file_that_goes_changes_the_fingerprint(model, name):
    before = mark(model)
    (model / name).unlink()
    assert mark(model) != before


def test_a_file_that_comes_changes_the_fingerprint(model):
    before = mark(model)
    write_json(model / "transformer" / "model.fp16.safetensors", "")
    assert mark(model) != before


def test_other_files_do_not_change_the_fingerprint(model):
    """A part that is not chosen, and what a download or a file manager leaves behind."""
    make(model, "transformer/.cache/download")
    write_json(model / "transformer" / "README.md", "old")
    before = mark(model)
    touch(model / "vae" / "config.json")
    write_json(model / "README.md", "new")
    write_json(model / "transformer" / "README.md", "newer")
    write_json(model / "transformer" / ".DS_Store", "new")
    write_json(model / "transformer" / ".cache" / "download" / "x.lock", "new")
    write_json(model / "transformer" / ".cache" / "y.lock", "new")
    assert mark(model) == before


def test_a_linked_file_is_followed(model, tmp_path):
    path = model / "transformer" / "config.json"
    blob = path.rename(tmp_path / "blob")
    path.symlink_to(blob)
    before = mark(model)
    touch(blob)
    assert mark(model) != before


def test_fingerprint_of_what_is_not_there(tmp_path):
    assert fingerprint([tmp_path / "gone"]) == []
    assert mark(tmp_path / "gone") == []


def test_fingerprint_does_not_depend_on_order_or_repetition(model):
    files = files_of(model, "transformer")
    assert fingerprint([*reversed(files), *files]) == fingerprint(files)


def test_parts_are_the_folders_of_the_published_layout():
    assert {"transformer", "text_encoder", "vae"} == diffusers_folder.PARTS
