"""Fit to VRAM's VAE on the real host: the same picture in strips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from . import lean_models
from .vae_models import kl_vae

pytestmark = pytest.mark.usefixtures("host")
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
    from pack.nodes.host.lean_vae import LeanForward

    vae = kl_vae()
    wanted = _stock(vae)
    fitted = _fit(model, vae, prefer=prefer)
    assert isinstance(fitted.first_stage_model.decoder.forward, LeanForward)
    with caplog.at_level("INFO"):
        made = fitted.decode(LATENT)
    assert "the host's own code runs" not in caplog.text
    assert (made - wanted).norm() < 1e-5 * wanted.norm()
