"""The random weights are what they claim: published names and shapes, sharded, sparse, seeded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from pack.testing import tiny_models
from pack.testing.published_layout import single_file_part
from safetensors import safe_open

PARTS = ("transformer", "text_encoder")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return tiny_models.write_small_folder(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    return tiny_models.write_real_width_folder(tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def real_files(tmp_path_factory) -> dict[str, Path]:
    return tiny_models.write_real_width_files(tmp_path_factory.mktemp("files"), te_layers=3)


def _index(folder: Path) -> dict:
    (path,) = folder.glob("*.safetensors.index.json")
    return json.loads(path.read_text())


def _shapes(path: Path) -> dict[str, list[int]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _all_shapes(folder: Path) -> dict[str, list[int]]:
    merged: dict[str, list[int]] = {}
    for path in folder.glob("*.safetensors"):
        merged |= _shapes(path)
    return merged


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("size", ["small", "real"])
def test_shards_and_index_agree(size, part, request):
    folder = request.getfixturevalue(size) / part
    index = _index(folder)
    found = {name: path.name for path in folder.glob("*.safetensors") for name in _shapes(path)}
    assert index["weight_map"] == found
    assert len(set(found.values())) > 1
    values = sum(torch.Size(shape).numel() for shape in _all_shapes(folder).values())
    assert index["metadata"]["total_size"] == values * (4 if size == "small" else 2)


@pytest.mark.parametrize("part", tiny_models.SINGLE_FILE_NAMES)
def test_real_widths_have_the_small_models_tensors(small, real, part):
    """The hand-written files hold what save_pretrained writes, less the main layers' number."""

    def names(folder: Path) -> set[str]:
        return {n for n in _all_shapes(folder / part) if not n.startswith("layers.1.")}

    assert names(real) == names(small)


def test_real_widths_are_the_published_ones(real_files):
    shapes = {part: _shapes(path) for part, path in real_files.items()}
    for part, name, shape in (
        ("transformer", "layers.0.attention.qkv.weight", [11520, 3840]),
        ("transformer", "noise_refiner.1.feed_forward.w2.weight", [3840, 10240]),
        ("transformer", "context_refiner.0.attention.q_norm.weight", [128]),
        ("transformer", "cap_embedder.1.weight", [3840, 2560]),
        ("transformer", "t_embedder.mlp.2.weight", [256, 1024]),
        ("transformer", "final_layer.linear.weight", [64, 3840]),
        ("text_encoder", "model.embed_tokens.weight", [151936, 2560]),
        ("text_encoder", "model.layers.2.self_attn.k_proj.weight", [1024, 2560]),
        ("text_encoder", "model.layers.2.mlp.down_proj.weight", [2560, 9728]),
        ("vae", "encoder.down.3.block.1.conv2.weight", [512, 512, 3, 3]),
        ("vae", "decoder.up.0.block.0.nin_shortcut.weight", [128, 256, 1, 1]),
        ("vae", "decoder.mid.attn_1.proj_out.weight", [512, 512, 1, 1]),
    ):
        assert shapes[part][name] == shape, name
    assert "lm_head.weight" not in shapes["text_encoder"]


def test_real_width_files_are_mostly_holes(real, real_files):
    for paths in (list(real.rglob("*.safetensors")), list(real_files.values())):
        stats = [path.stat() for path in paths]
        assert sum(s.st_size for s in stats) > 3 * 10**9
        assert sum(s.st_blocks * 512 for s in stats) < 120 * 10**6


def _written_rows(name: str, rows: int) -> torch.Tensor:
    """All rows that are no hole, and some that are: to read 6 GB of holes takes seconds."""
    if name != "model.embed_tokens.weight":
        return torch.arange(min(rows, 80))
    return torch.cat([torch.arange(2100), torch.arange(151600, rows)])


@pytest.mark.parametrize("part", tiny_models.SINGLE_FILE_NAMES)
def test_real_widths_are_the_same_weights_in_both_layouts(real, real_files, part):
    single = safe_open(real_files[part], framework="pt")
    compared = 0
    for path in (real / part).glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                tensor = shard.get_tensor(name)
                target = single_file_part(part, name)
                start = target.slot * tensor.shape[0]
                there = single.get_slice(target.name)[start : start + tensor.shape[0]]
                there = there.reshape(tensor.shape)
                rows = _written_rows(name, tensor.shape[0])
                assert torch.equal(there[rows], tensor[rows]), name
                assert tensor[rows].any(), name
                compared += there.numel()
    assert compared == sum(torch.Size(s).numel() for s in _shapes(real_files[part]).values())


@pytest.mark.slow
def test_seed_decides_the_weights(small, tmp_path):
    same = tiny_models.write_small_folder(tmp_path / "same")
    other = tiny_models.write_small_folder(tmp_path / "other", seed=1)
    for path in small.rglob("*.safetensors"):
        relative = path.relative_to(small)
        assert path.read_bytes() == (same / relative).read_bytes()
        assert path.read_bytes() != (other / relative).read_bytes()


def test_activations_stay_of_order_one(tmp_path):
    """Eight layers deep; a model whose numbers vanish or explode would make every oracle blind."""
    folder = tiny_models.write_small_folder(tmp_path, layers=8)
    model = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(*s, generator=generator) for s in ((16, 1, 16, 16), (20, 64)))
    seen: list[float] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.std().item()))
    with torch.inference_mode():
        answer = model([x], torch.tensor([0.5]), [text]).sample[0]
    assert len(seen) == 8
    assert all(0.1 < value < 10 for value in [*seen, answer.std().item()])


def test_dim_must_be_a_multiple_of_384(tmp_path):
    with pytest.raises(ValueError, match="multiple of 384, got 512"):
        tiny_models.write_small_folder(tmp_path, dim=512)
