"""What Apply Gradient Checkpoint says of other families before a run."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from pack.nodes.denoiser.families import FAMILIES, FamilyRequest, family_peak_bytes
from pack.nodes.denoiser.plan import DenoiserChoice
from pack.nodes.units import MIB
from pack.testing import families as measured

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_node_says_what_it_predicts(name: str, caplog: pytest.LogCaptureFixture) -> None:
    from comfy.model_patcher import ModelPatcher
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    published, meta = FAMILIES[name], torch.device("meta")
    family = measured.FAMILIES[published.name]
    model = measured.build(family, dtype=torch.bfloat16, device=meta)
    patcher = ModelPatcher(model, load_device=meta, offload_device=meta)
    with caplog.at_level(logging.INFO):
        ApplyGradientCheckpoint.execute(patcher, prefer="speed")
        ApplyGradientCheckpoint.execute(patcher, blocks="every second")
    said = [record.getMessage() for record in caplog.records]
    is_video = published.frames > 1
    width, height, frames = (1280, 720, 81) if is_video else (2048, 2048, 1)
    request = FamilyRequest(published, width, height, frames=frames)
    peak = family_peak_bytes(request, request.plan(DenoiserChoice("speed")))
    shape = rf"{width}x{height}(, 81 frames)?$"
    assert re.search(rf" -> {round(peak / MIB)} MiB predicted at {shape}", said[0]), said[0]
    assert "every second: computed in pieces under ComfyUI's own forward" in said[1]
