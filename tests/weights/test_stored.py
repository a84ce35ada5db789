"""Stored tensors compute what the tensors in the file compute, and keep nothing of them."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from pack.nodes.weights.component import open_file, open_folder
from pack.nodes.weights.header import WeightsError
from pack.nodes.weights.stored import _TORCH_DTYPES, StoredTensor, state_dict
from pack.testing import fake_files
from safetensors import safe_open
from safetensors.torch import save_file


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Eighths: sums of their products are exact, whatever order an address makes torch add them in.
    return torch.randn(*shape, generator=generator).mul(32).round().div(8).to(dtype)


def stored_from(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    save_file(tensors, path)
    return state_dict(open_file(path, path.name))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def real(request) -> torch.Tensor:
    return random(6, 5, dtype=request.param)


@pytest.fixture
def stored(tmp_path, real) -> torch.Tensor:
    return stored_from(tmp_path / "x.safetensors", {"a": real})["a"]


def test_what_it_says_of_itself(stored, real):
    assert isinstance(stored, StoredTensor)
    assert stored.shape == real.shape
    assert stored.dtype == real.dtype
    assert stored.device.type == "cpu"
    assert stored.numel() == 30
    assert stored.element_size() == real.element_size()
    assert stored.nbytes == real.nbytes
    assert stored.ndim == 2
    assert not stored.requires_grad
    assert repr(stored) == f"StoredTensor(shape=(6, 5), dtype={real.dtype})"


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: torch.zeros(6, 5, dtype=torch.float64).copy_(x),
        lambda x: torch.cat([x, x[:2], x], dim=0),
        lambda x: x.to(torch.float16),
        lambda x: x.to(torch.float8_e4m3fn).float(),
        lambda x: x.to(device="cpu", dtype=torch.float32, copy=True),
        lambda x: x.float() + 1,
        lambda x: x[1:4, ::2],
        lambda x: x[2],
        lambda x: x.narrow(0, 2, 3),
        lambda x: x.chunk(3, dim=0)[1],
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.view(-1),
        lambda x: x.unsqueeze(0),
        lambda x: x.clone(),
        lambda x: x.detach(),
        lambda x: x * 2 - x,
        lambda x: x @ x.T,
        lambda x: torch.nn.functional.linear(x, x),
        lambda x: x.abs().max(),
        lambda x: torch.std(x.float(), unbiased=False),
        lambda x: x > 0,
        lambda x: torch.where(x > 0, x, -x),
        lambda x: torch.zeros(3, 6, 5, dtype=x.dtype).index_copy(0, torch.tensor([1]), x[None]),
    ],
)
def test_every_operation_gives_an_ordinary_tensor_of_the_same_bits(stored, real, operation):
    got, wanted = operation(stored), operation(real)
    assert type(got) is torch.Tensor
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


def test_the_same_answer_again_and_again(stored, real):
    for _ in range(3):
        assert torch.equal(stored, real)
    assert torch.allclose(stored, real)
    assert stored[0, 0].item() == real[0, 0].item()


def test_a_slice_of_a_parameter_takes_it(stored, real):
    into = torch.zeros(12, 5, dtype=real.dtype)
    into[3:9] = stored
    assert torch.equal(into[3:9], real)
    assert not into[:3].any()
    assert not into[9:].any()


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.copy_(torch.zeros(6, 5)),
        lambda x: x.zero_(),
        lambda x: torch.add(torch.ones(6, 5), 1, out=x),
    ],
    ids=["add_", "copy_", "zero_", "out="],
)
def test_a_write_is_refused_and_not_lost(stored, real, write):
    """Bug: the write went into values that were forgotten at once."""
    with pytest.raises(TypeError, match="cannot write into a tensor that lies on disk"):
        write(stored)
    assert torch.equal(stored, real)


# Written out, because the table itself would agree with any mistake in it.
ELEMENT_TYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def test_the_list_of_element_types_is_complete():
    assert len(_TORCH_DTYPES) == len(ELEMENT_TYPES)


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_every_element_type(tmp_path, dtype):
    """The library writes the file, so a type that is read as another one is noticed."""
    real = torch.arange(-4, 8).view(3, 4).to(dtype)
    stored = stored_from(tmp_path / "x.safetensors", {"a": real})["a"]
    assert stored.dtype == stored.clone().dtype == dtype
    assert torch.equal(stored.to(torch.float64), real.to(torch.float64))


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F8_E5M2FNUZ"])
def test_an_element_type_of_quantised_files(tmp_path, dtype):
    path = fake_files.write_file(tmp_path / "x.safetensors", {"a": (4,)}, dtype=dtype)
    with pytest.raises(WeightsError) as caught:
        state_dict(open_file(path, "M/"))
    assert str(caught.value) == (
        f"M/ stores a as {dtype}, which cannot be loaded from a folder: use a single file for "
        "quantised weights"
    )


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)], ids=str)
def test_odd_shapes(tmp_path, shape):
    stored = stored_from(tmp_path / "x.safetensors", {"a": torch.ones(shape)})["a"]
    assert stored.shape == shape
    assert torch.equal(stored, torch.ones(shape))


class Reader:
    """Hands out tensors and remembers which of them are still alive."""

    def __init__(self, real: torch.Tensor) -> None:
        self.real = real
        self.given: list[weakref.ref] = []

    def __call__(self) -> torch.Tensor:
        tensor = self.real.clone()
        self.given.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    def alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.given)


def test_nothing_is_read_before_it_is_asked_for_and_nothing_is_kept_afterwards():
    reader = Reader(random(4, 4))
    stored = StoredTensor((4, 4), torch.float32, reader)
    assert (stored.shape, stored.dtype, stored.nbytes) == ((4, 4), torch.float32, 64)
    assert len(reader.given) == 0

    into = torch.empty(4, 4)
    into.copy_(stored)
    assert (len(reader.given), reader.alive()) == (1, 0)

    kept = stored * 2
    assert (len(reader.given), reader.alive()) == (2, 0)
    assert torch.equal(kept, reader.real * 2)

    view = stored[1:]
    assert (len(reader.given), reader.alive()) == (3, 1)
    del view
    assert reader.alive() == 0


def test_a_file_is_read_and_never_mapped(tmp_path):
    """Bug: --disable-mmap was ignored. Nor does a descriptor live longer than the read."""
    path = tmp_path / "x.safetensors"
    stored = stored_from(path, {"a": torch.zeros(1 << 16)})["a"]

    def mappings() -> int:
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("needs /proc/self/maps")
        return maps.read_text().count(str(path))

    with safe_open(path, framework="pt") as mapped:
        values = mapped.get_tensor("a")
        assert mappings() > 0
    del values, mapped
    values = stored.detach()
    assert mappings() == 0
    assert values.sum() == 0
    descriptors = Path("/proc/self/fd").iterdir()
    assert str(path) not in [os.path.realpath(descriptor) for descriptor in descriptors]


def test_a_file_that_was_replaced_is_not_read_at_the_old_place(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(8), "b": torch.ones(8)}, path)
    opened = open_file(path, path.name)
    save_file({"a": torch.zeros(16), "b": torch.ones(8)}, path)
    with pytest.raises(WeightsError) as caught:
        state_dict(opened)
    assert str(caught.value) == ("x.safetensors has changed on the disk: run the loader node again")


def test_a_file_that_shrinks_while_it_is_loaded(tmp_path):
    """Bug: what the file no longer held came as whatever lay in memory."""
    path = tmp_path / "x.safetensors"
    stored = stored_from(path, {"a": torch.ones(8)})["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightsError) as caught:
        stored.clone()
    assert str(caught.value) == ("x.safetensors has changed on the disk: run the loader node again")


class Small(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 6).to(dtype)
        self.register_buffer("table", torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_module_loads_it(tmp_path, dtype):
    """As the host loads: strict=False, assign=False; the model's dtype decides."""
    weights = {"linear.weight": random(6, 5), "linear.bias": random(6), "table": random(3)}
    module, twin = Small(dtype), Small(dtype)
    twin.load_state_dict(weights)
    missing, unexpected = module.load_state_dict(
        stored_from(tmp_path / "x.safetensors", weights), strict=False
    )
    assert not missing
    assert not unexpected
    for name, wanted in twin.state_dict().items():
        got = module.state_dict()[name]
        assert type(got) is torch.Tensor
        assert got.dtype == dtype
        assert torch.equal(got.float(), wanted.float())


def test_a_module_refuses_another_shape(tmp_path):
    weights = {"linear.weight": random(7, 5), "linear.bias": random(6), "table": random(3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for linear\.weight"):
        Small(torch.float32).load_state_dict(stored_from(tmp_path / "x.safetensors", weights))


QKV = {"q": ("qkv", (0, 0, 4)), "k": ("qkv", (0, 4, 4)), "v": ("qkv", (0, 8, 4)), "o": "out"}


def shards(folder: Path, *tensors: dict[str, torch.Tensor]):
    """A folder with one shard for each dictionary."""
    weight_map = {}
    for number, shard in enumerate(tensors, start=1):
        name = f"model-{number:05d}-of-{len(tensors):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    fake_files.write_index(folder, weight_map)
    return open_folder(folder, "M/")


def test_renamed_and_joined_over_shards(tmp_path):
    q, k, v, o, other = (random(4, 3, seed=seed) for seed in range(5))
    found = state_dict(shards(tmp_path, {"v": v, "other": other}, {"k": k, "o": o}, {"q": q}), QKV)
    assert found.keys() == {"qkv", "out", "other"}
    assert found["qkv"].shape == (12, 3)
    assert torch.equal(found["qkv"], torch.cat([q, k, v]))
    assert torch.equal(found["out"], o)
    assert torch.equal(found["other"], other)


def test_joined_along_another_axis(tmp_path):
    a, b = random(3, 2), random(3, 5)
    targets = {"b": ("ab", (1, 2, 5)), "a": ("ab", (1, 0, 2))}
    found = state_dict(shards(tmp_path, {"a": a, "b": b}), targets)
    assert torch.equal(found["ab"], torch.cat([a, b], dim=1))


@pytest.mark.parametrize(("gone", "at"), [("q", 0), ("k", 4)])
def test_a_missing_part(tmp_path, gone, at):
    tensors = {name: random(4, 3) for name in "qkv" if name != gone}
    with pytest.raises(WeightsError) as caught:
        state_dict(shards(tmp_path, tensors), QKV)
    assert str(caught.value) == (
        f"M/ lacks a part of qkv, the one that begins at {at}: download it again"
    )


@pytest.mark.parametrize(
    ("odd", "shown"),
    [
        (torch.zeros(4, 2), "F32 of shape [4, 2]"),
        (torch.zeros(4, 3, dtype=torch.bfloat16), "BF16 of shape [4, 3]"),
        (torch.zeros(4), "F32 of shape [4]"),
    ],
    ids=["shape", "dtype", "axes"],
)
def test_parts_that_do_not_match(tmp_path, odd, shown):
    """Bug: they were noticed when the model was half loaded."""
    tensors = {"q": random(4, 3), "k": odd, "v": random(4, 3)}
    with pytest.raises(WeightsError) as caught:
        state_dict(shards(tmp_path, tensors), QKV)
    assert str(caught.value) == (
        f"M/ stores k as {shown}, unlike the other parts of qkv: download it again"
    )


def test_a_part_without_an_axis(tmp_path):
    tensors = {"q": torch.tensor(1.0), "k": random(4, 3), "v": random(4, 3)}
    with pytest.raises(WeightsError, match=r"^M/ lacks the tensor q: download it again$"):
        state_dict(shards(tmp_path, tensors), QKV)
