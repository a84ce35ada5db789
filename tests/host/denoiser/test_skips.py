"""The skip tensors of a U-Net wait in RAM, or are computed again: the same bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pack.testing import attention_models
from pack.testing.families import CALLS, FAMILIES, measure

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

# SDXL with a transformer block where it has two or ten: what waits is the same.
SHALLOW = {
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def denoiser() -> Any:
    return attention_models.stable_diffusion().model.diffusion_model


def called(unet: Any, latent: torch.Tensor, options: dict[str, Any], **given: Any) -> torch.Tensor:
    time, text = torch.full((len(latent),), 700.0), drawn(len(latent), 7, 48, seed=2)
    return unet(latent, time, text, transformer_options=dict(options), **given)


def shapes_of(unet: Any, latent: torch.Tensor) -> list[torch.Size]:
    """Of the skip tensors, in the order of the input blocks."""
    shapes: list[torch.Size] = []

    def note(h: torch.Tensor, options: Any) -> torch.Tensor:
        shapes.append(h.shape)
        return h

    called(unet, latent, {"patches": {"input_block_patch": [note]}})
    return shapes


def room_for(shapes: list[torch.Size]) -> torch.Tensor:
    return torch.empty(4 * sum(map(math.prod, shapes)), dtype=torch.uint8)


def wrapped(wrapper: Any, **more: Any) -> dict[str, Any]:
    return {"wrappers": {"diffusion_model": {"ours": [wrapper], **more}}}


@pytest.mark.parametrize("sides", [(24, 16), (22, 18), (13, 17)])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_what_waits_in_ram_comes_back(sides: tuple[int, int], batch: int) -> None:
    from pack.nodes.host.denoiser.skips import Skips
    from pack.nodes.host.denoiser.unet import skip_elements

    unet, latent = denoiser(), drawn(batch, 4, *sides, seed=1)
    wanted = called(unet, latent, {})
    first, *others = shapes_of(unet, latent)
    total = batch * skip_elements(unet, *sides, with_first=False)
    assert 4 * total == room_for(others).nbytes
    assert batch * skip_elements(unet, *sides, with_first=True) - total == math.prod(first)
    for shapes in (others, others[:-1], []):  # what finds no room stays
        memory = room_for(shapes)
        skips = Skips(latent, unet.input_blocks[0][0], memory)
        assert torch.equal(called(unet, latent, skips.patched({})), wanted)
        assert skips._used == memory.nbytes and not skips._waiting and skips._passing is None


@pytest.mark.parametrize("waits", ["first too", "others", "on the card"])
@torch.inference_mode()
def test_a_controlnet_is_added_to_what_comes_back(waits: str) -> None:
    """As the host adds it; one of the maps gets none, and one gets what does not fit."""
    from pack.nodes.host.denoiser.skips import Skips

    unet, latent = denoiser(), drawn(2, 4, 24, 16, seed=1)
    shapes = shapes_of(unet, latent)
    added: list[Any] = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    added[1], added[2] = None, added[2][:, :, 1:]

    def control() -> dict[str, Any]:
        return {"output": list(added), "middle": [drawn(1, seed=9)], "input": []}

    wanted = called(unet, latent, {}, control=control())
    given = control()
    is_first_too = waits == "first too"
    memory = None if waits == "on the card" else room_for(shapes[not is_first_too :])
    again = None if is_first_too else unet.input_blocks[0][0]
    skips = Skips(latent, again, memory, given)
    got = called(unet, latent, skips.patched({}), control={**given, "output": []})
    assert torch.equal(got, wanted) and given["output"] == []
    assert not torch.equal(wanted, called(unet, latent, {}))


@pytest.mark.parametrize("kind", ["input_block_patch", "input_block_patch_after_skip"])
@torch.inference_mode()
def test_what_a_patch_writes_into_a_map_waits_too(kind: str) -> None:
    """Names the bug: what a patch wrote into a map was missing where the map came back."""
    from pack.nodes.host.denoiser.skips import Skips, make_wrapper

    unet, latent, heard = denoiser(), drawn(1, 4, 24, 16, seed=1), []

    def double(h: torch.Tensor, options: Any) -> torch.Tensor:
        return h.mul_(2)

    options = {"patches": {kind: [double]}}
    wanted = called(unet, latent, options)
    ours = {**options, **wrapped(make_wrapper(heard.append))}
    assert torch.equal(called(unet, latent, ours), wanted)
    assert heard == [f"another node patches the input blocks ({kind})"]
    skips = Skips(latent, None, room_for(shapes_of(unet, latent)))
    assert torch.equal(called(unet, latent, skips.patched(options)), wanted)
    assert not torch.equal(wanted, called(unet, latent, {}))


@torch.inference_mode()
def test_another_packs_wrapper_may_change_what_the_forward_gets() -> None:
    """Names the bug: the first map was computed again of the latent from outside that wrapper."""
    from pack.nodes.host.denoiser.skips import make_wrapper

    unet, latent = denoiser(), drawn(1, 4, 24, 16, seed=1)

    def half(executor: Any, x: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        return executor(x * 0.5, *args, **more)

    wanted = called(unet, latent * 0.5, {})
    inside = wrapped(make_wrapper(pytest.fail), theirs=[half])
    assert torch.equal(called(unet, latent, inside), wanted)
    outside = {"wrappers": {"diffusion_model": {"theirs": [half], "ours": [
        make_wrapper(pytest.fail)
    ]}}}  # fmt: skip
    assert torch.equal(called(unet, latent, outside), wanted)


@torch.inference_mode()
def test_an_error_within_a_call_changes_no_later_one() -> None:
    from pack.nodes.host.denoiser.skips import make_wrapper

    unet, latent = denoiser(), drawn(1, 4, 24, 16, seed=1)
    options = wrapped(make_wrapper(pytest.fail))
    wanted = called(unet, latent, {})
    assert torch.equal(called(unet, latent, options), wanted)

    def fail(h: torch.Tensor, skip: torch.Tensor, options: Any) -> Any:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        called(unet, latent, {**options, "patches": {"output_block_patch": [fail]}})
    assert torch.equal(called(unet, latent, options), wanted)


@pytest.mark.parametrize("reason", ["T2I-Adapter", "input_block_patch", "first block"])
@torch.inference_mode()
def test_why_the_first_waits_on_the_card(reason: str) -> None:
    from pack.nodes.host.denoiser.skips import make_wrapper

    unet, latent, heard = denoiser(), drawn(1, 4, 24, 16, seed=1), []
    options = wrapped(make_wrapper(heard.append))
    added = [drawn(1, 32, 24, 16, seed=9)] if reason == "T2I-Adapter" else []
    if reason == "first block":
        unet.input_blocks[0][0].register_forward_hook(lambda *_: None)
    else:
        options["patches"] = {reason: [lambda h, options: h]}
    wanted = called(unet, latent, {**options, "wrappers": {}}, control={"input": list(added)})
    assert torch.equal(called(unet, latent, options, control={"input": list(added)}), wanted)
    assert len(heard) == 1 and reason in heard[0]


class _Driver:
    """What the host and torch call to pin RAM and to wait for a card, without a card."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        self.calls.append(f"register {size}")
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append("unregister")
        return 0

    def synchronize(self) -> None:
        self.calls.append("wait")


@pytest.mark.parametrize("fails", [False, True])
def test_ram_is_pinned_once_a_sampling(
    host: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    from pack.nodes.host.base.server import NodeLog
    from pack.nodes.host.denoiser.skips import WaitingRam

    driver, card = _Driver(), torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: driver)
    monkeypatch.setattr(host.model_management, "MAX_PINNED_MEMORY", 2**40)
    ram = WaitingRam(NodeLog("Apply Gradient Checkpoint", None))

    class Executor:
        class class_obj:  # noqa: N801 (the host's name)
            class model_patcher:  # noqa: N801
                load_device = card

        def __call__(self, steps: int) -> str:
            first = ram.of_call(4096, card)
            for _ in range(steps):
                assert ram.of_call(4096, card).data_ptr() == first.data_ptr()
            # Another card's call runs at the same time, and would write over it.
            assert ram.of_call(4096, torch.device("cuda:1")).data_ptr() != first.data_ptr()
            if fails:
                raise ValueError("injected")
            return "sampled"

    if fails:
        with pytest.raises(ValueError, match="injected"):
            ram.of_sampling(Executor(), 3)
    else:
        assert ram.of_sampling(Executor(), 3) == "sampled"
    assert driver.calls == ["register 4096", "wait", "unregister"]
    assert (
        ram.of_call(4096, card).nbytes == 4096 and len(driver.calls) == 3
    )  # outside of a sampling


@pytest.mark.once
@pytest.mark.slow
def test_on_a_card_the_largest_join_is_what_is_left() -> None:
    """`smallest`: SDXL's first block of the last level joins 640 and 320 channels into 960."""
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    def patched(patcher: Any) -> Any:
        return ApplyGradientCheckpoint.execute(patcher, prefer="smallest").args[0]

    if not torch.backends.cuda.is_built():
        pytest.skip("torch is built without CUDA")
    call = CALLS["SDXL"][1]
    tracker = measure(FAMILIES["SDXL"], call, changed=SHALLOW, patched=patched)
    pixels = call.batch * (call.width_px // 8) * (call.height_px // 8)
    assert tracker.peak_op == "aten.cat.default"
    assert tracker.peak_bytes <= 1.02 * 2 * 960 * pixels * 2
