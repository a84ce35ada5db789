"""Random damage to a component folder: every part is read in full, or refused with a sentence."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from pack.nodes.weights import family, stored
from pack.nodes.weights.component import Component, open_folder
from pack.nodes.weights.header import WeightsError
from pack.testing import fake_files
from safetensors import safe_open
from safetensors.torch import save_file

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
# d lies in both, and the index names the second.
TENSORS = {
    FIRST: {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4).half(), "d": torch.ones(3)},
    SECOND: {"c": torch.arange(5), "d": torch.zeros(2, 2)},
}
WEIGHT_MAP = {name: shard for shard, tensors in TENSORS.items() for name in tensors}


def bounded(max_examples: int) -> settings:
    return settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=max_examples,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "whole"
    folder.mkdir()
    for shard, tensors in TENSORS.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    fake_files.write_index(folder, WEIGHT_MAP)
    (folder / "config.json").write_text('{"dim": 8}')
    return folder


@pytest.fixture
def outcomes():
    """Counts what was accepted and refused; a fuzz test that sees only one of them tests little."""
    counts: Counter[str] = Counter()
    yield counts
    assert min(counts["accepted"], counts["refused"]) >= 10, counts


def copy_of(folder: Path) -> Path:
    """A copy in which what an earlier example broke is whole again."""
    copy = folder.with_name("copy")
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        fake_files.overwrite(copy / path.name, path.read_bytes())
    return copy


def check(folder: Path) -> Component | None:
    """Opens the folder; whatever is accepted must be what the safetensors library reads."""
    start = time.thread_time()
    try:
        found = open_folder(folder, "M/part/")
        tensors = stored.state_dict(found)
    except WeightsError as error:
        assert str(error).isprintable()
        return None
    finally:
        assert time.thread_time() - start < 1
    assert tensors.keys() == found.tensors.keys() == found.file_of.keys()
    for name, tensor in tensors.items():
        with safe_open(found.file_of[name], framework="pt") as file:
            wanted = file.get_tensor(name)
        assert tensor.shape == wanted.shape
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor.to(wanted.dtype, copy=True).view(-1), wanted.view(-1))
    return found


def test_the_whole_folder_is_accepted(whole):
    found = check(whole)
    assert found is not None
    assert set(found.tensors) == set(WEIGHT_MAP)


@bounded(400)
@given(data=st.data())
def test_damaged_bytes(whole, outcomes, data):
    """Bytes flipped, cut off or put in, in one of the files."""
    folder = copy_of(whole)
    path = folder / data.draw(st.sampled_from([FIRST, SECOND, INDEX, "config.json"]))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "flip", "cut", "insert"]))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del raw[at:]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    fake_files.overwrite(path, bytes(raw))
    outcomes["refused" if check(folder) is None else "accepted"] += 1


odd_names = [INDEX, "config.json", "..", "", "x" * 300, "a\0b", "\ud800", "a/b"]
shard_names = st.sampled_from([FIRST, SECOND] * 4 + odd_names) | st.text(max_size=20)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@bounded(300)
@given(
    weight_map=st.dictionaries(
        st.sampled_from([*WEIGHT_MAP, "e"]), shard_names | json_values, max_size=5
    )
    | st.builds(
        lambda names, d: {name: WEIGHT_MAP[name] for name in names} | {"d": d},
        st.lists(st.sampled_from(list(WEIGHT_MAP))),
        st.sampled_from([FIRST, SECOND]),
    )
    | json_values
)
def test_random_index(whole, outcomes, weight_map):
    folder = copy_of(whole)
    fake_files.write_index(folder, weight_map)
    found = check(folder)
    if found is not None:
        assert {name: path.name for name, path in found.file_of.items()} == weight_map
    outcomes["refused" if found is None else "accepted"] += 1


@bounded(150)
@given(config=json_values | st.dictionaries(st.sampled_from(["dim", "rope_theta"]), json_values))
def test_random_config(whole, config):
    folder = copy_of(whole)
    fake_files.overwrite(folder / "config.json", json.dumps(config).encode())
    found = check(folder)
    assert (found is not None) == isinstance(config, dict)


@bounded(100)
@given(gone=st.sets(st.sampled_from([FIRST, SECOND, INDEX, "config.json"]), min_size=1))
def test_missing_files(whole, gone):
    folder = copy_of(whole)
    for name in gone:
        (folder / name).unlink()
    assert (check(folder) is not None) == (gone == {"config.json"})


KNOWN = {
    **fake_files.z_image_shapes(),
    **fake_files.z_image_shapes(diffusers=True),
    **fake_files.qwen3_shapes(),
    **fake_files.vae_shapes(),
    "taesd_decoder.1.weight": (4, 16, 3, 3),
    "bn.running_mean": (4,),
}
changed_shapes = st.lists(st.integers(0, 300), max_size=5)


@bounded(300)
@given(
    group=st.sampled_from([fake_files.z_image_shapes(), fake_files.qwen3_shapes(), KNOWN]),
    lacking=st.sets(st.sampled_from(sorted(KNOWN)), max_size=3),
    changed=st.dictionaries(st.sampled_from(sorted(KNOWN)), changed_shapes, max_size=3),
    dtype=st.sampled_from(["BF16", "F8_E4M3", "U8"]),
    config=st.dictionaries(
        st.sampled_from(["hidden_size", "rope_theta", "rope_parameters", "rms_norm_eps"]),
        json_values,
        max_size=2,
    ),
)
def test_random_shapes_get_an_answer(outcomes, group, lacking, changed, dtype, config):
    """Whatever a whole file may hold, each check answers or refuses it."""
    shapes = {n: s for n, s in {**group, **changed}.items() if n not in lacking}
    found = fake_files.component(shapes, dtype=dtype, config=config)
    assert family.describe(found.tensors)
    for look in (
        lambda: family.z_image(found, "Z-Image-Turbo"),
        lambda: family.check_text_encoder(found, text_width=8),
        lambda: family.check_vae(found, latent_channels=16),
    ):
        try:
            look()
            outcomes["accepted"] += 1
        except WeightsError as error:
            outcomes["refused"] += 1
            assert str(error).isprintable()
