"""The skip tensors of a U-Net wait in RAM, or are computed again: the same bits."""

from __future__ import annotations

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


def called(unet: Any, latent: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    time, text = torch.full((len(latent),), 700.0), drawn(len(latent), 7, 48, seed=2)
    return unet(latent, time, text, transformer_options=options)


@pytest.mark.parametrize("sides", [(24, 16), (22, 18), (13, 17)])
@pytest.mark.parametrize("batch", [1, 2])
@torch.inference_mode()
def test_what_waits_in_ram_comes_back(sides: tuple[int, int], batch: int) -> None:
    from pack.nodes.host.denoiser.skips import Skips
    from pack.nodes.host.denoiser.unet_parts import skip_elements

    unet, latent = denoiser(), drawn(batch, 4, *sides, seed=1)
    wanted = called(unet, latent, {})
    sizes: list[int] = []

    def note(h: torch.Tensor, options: Any) -> torch.Tensor:
        sizes.append(h.numel())
        return h

    called(unet, latent, {"patches": {"input_block_patch": [note]}})
    total = batch * skip_elements(unet, *sides)
    assert total == sum(sizes[1:])
    for elements in (total, sum(sizes[1:-1]), 0):  # what finds no room stays
        memory = torch.empty(4 * elements, dtype=torch.uint8)
        skips = Skips(unet.input_blocks[0], latent, memory)
        assert torch.equal(called(unet, latent, skips.patched({})), wanted)
        assert skips._used == memory.nbytes and not skips._waiting and skips._passing is None


@torch.inference_mode()
def test_an_error_within_a_call_changes_no_later_one() -> None:
    from pack.nodes.host.denoiser.skips import make_wrapper

    model = attention_models.stable_diffusion()
    unet, latent = model.model.diffusion_model, drawn(1, 4, 24, 16, seed=1)
    wrapper = make_wrapper(pytest.fail)
    options: dict[str, Any] = {"wrappers": {"diffusion_model": {"ours": [wrapper]}}}
    wanted = called(unet, latent, {})
    assert torch.equal(called(unet, latent, options), wanted)

    def fail(h: torch.Tensor, skip: torch.Tensor, options: Any) -> Any:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        called(unet, latent, {**options, "patches": {"output_block_patch": [fail]}})
    assert torch.equal(called(unet, latent, options), wanted)


@pytest.mark.parametrize("reason", ["ControlNet", "input_block_patch", "first block"])
@torch.inference_mode()
def test_why_all_wait_on_the_card(reason: str) -> None:
    from pack.nodes.host.denoiser.skips import make_wrapper

    unet, latent, heard = denoiser(), drawn(1, 4, 24, 16, seed=1), []
    options: dict[str, Any] = {
        "wrappers": {"diffusion_model": {"ours": [make_wrapper(heard.append)]}}
    }
    given: dict[str, Any] = {}
    if reason == "ControlNet":
        given["control"] = {"output": [], "middle": [], "input": []}
    elif reason == "first block":
        unet.input_blocks[0][0].register_forward_hook(lambda *_: None)
    else:
        options["patches"] = {reason: [lambda h, options: h]}
    time, text = torch.full((1,), 700.0), drawn(1, 7, 48, seed=2)
    wanted = unet(latent, time, text, transformer_options={**options, "wrappers": {}}, **given)
    assert torch.equal(unet(latent, time, text, transformer_options=options, **given), wanted)
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

    driver = _Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: driver)
    monkeypatch.setattr(host.model_management, "MAX_PINNED_MEMORY", 2**40)
    ram = WaitingRam(NodeLog("Apply Gradient Checkpoint", None))

    class Executor:
        class class_obj:  # noqa: N801 (the host's name)
            class model_patcher:  # noqa: N801
                load_device = torch.device("cuda")

        def __call__(self, steps: int) -> str:
            first = ram.of_call(4096)
            for _ in range(steps):
                assert ram.of_call(4096).data_ptr() == first.data_ptr()
            if fails:
                raise ValueError("injected")
            return "sampled"

    if fails:
        with pytest.raises(ValueError, match="injected"):
            ram.of_sampling(Executor(), 3)
    else:
        assert ram.of_sampling(Executor(), 3) == "sampled"
    assert driver.calls == ["register 4096", "wait", "unregister"]
    assert ram.of_call(4096).nbytes == 4096 and len(driver.calls) == 3  # outside of a sampling


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
