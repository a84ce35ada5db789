"""Fit to VRAM's VAE on the real host: the same picture, and one choice for a whole call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing import lean_models
from pack.testing.vae_models import At, kl_vae, last_conv, raise_oom

pytestmark = pytest.mark.usefixtures("host")
ROOM = 8 * 2**30
LATENT = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder).model


def _fit(model: Any, vae: Any, **options: Any) -> Any:
    from pack.nodes.fit_to_vram import FitToVRAM

    return FitToVRAM.execute(model, vae=vae, width=64, height=64, **options).args[1]


def _stock(vae: Any) -> torch.Tensor:
    picture = vae.decode(LATENT)  # loads it: that takes weight functions away
    assert picture.std() > 0.05, "a picture of one colour shows nothing"
    return picture


@pytest.mark.parametrize("prefer", ["speed", "balance", "smallest"])
@torch.inference_mode()
def test_the_vae_is_lean_and_decodes_as_stock(
    model: Any, prefer: str, caplog: pytest.LogCaptureFixture
) -> None:
    from pack.nodes.host.vae.forward import LeanForward

    vae = kl_vae()
    wanted = _stock(vae)
    fitted = _fit(model, vae, prefer=prefer)
    assert isinstance(fitted.first_stage_model.decoder.forward, LeanForward)
    with caplog.at_level("INFO"):
        made = fitted.decode(LATENT)
    assert "ComfyUI's own code runs" not in caplog.text
    assert (made - wanted).norm() < 1e-5 * wanted.norm()


class _Room:
    """What the card has free, as a node that loads a model beside changes it."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes

    def __call__(self, device: torch.device) -> int:
        return self.room_bytes

    def vanish(self) -> None:
        self.room_bytes = 1


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> _Room:
    from pack.nodes.host.fit import budget

    room = _Room(ROOM)
    monkeypatch.setattr(budget, "room_bytes", room)
    return room


@torch.inference_mode()
def test_out_of_memory_while_the_room_shrinks_is_tried_again(
    model: Any, room: _Room, caplog: pytest.LogCaptureFixture
) -> None:
    """The fourth plan was looked up with speed, and made with smallest, which has none.

    Its AttributeError stood in the place of the out-of-memory error.
    """
    vae = kl_vae()
    wanted = _stock(vae)
    fitted = _fit(model, vae, prefer="speed")

    def fail() -> None:
        if run_out.count == 3:
            room.vanish()
        raise_oom()

    conv = last_conv(vae)
    conv.weight_function = [run_out := At(fail, {1, 2, 3})]
    try:
        with caplog.at_level("INFO"):
            made = fitted.first_stage_model.decode(LATENT[:1])
    finally:
        conv.weight_function = []
    assert "prefer balance" in caplog.text
    made = fitted.process_output(made).movedim(1, -1)
    assert (made - wanted[:1]).norm() < 1e-5 * wanted.norm()


@torch.inference_mode()
def test_a_batch_is_decoded_with_one_preference(model: Any, room: _Room) -> None:
    vae = kl_vae()
    _stock(vae)
    fetches = []
    for cuts_room in (False, True):
        room.room_bytes = ROOM
        fitted = _fit(model, vae, prefer="speed")
        conv = last_conv(vae)
        fetch = At(room.vanish if cuts_room else lambda: None, {1})
        conv.weight_function = [fetch]
        try:
            fitted.first_stage_model.decode(LATENT)
        finally:
            conv.weight_function = []
        fetches.append(fetch.count)
    assert fetches == [2, 2]
