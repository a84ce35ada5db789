"""The planner against the host: weights of all models, and the text encoder's peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.nodes.denoiser.sizes import Z_IMAGE
from pack.nodes.fit.stages import FLUX_DECODER, FLUX_ENCODER, text_stage
from pack.nodes.fit.text_encoder import QWEN3_4B
from pack.nodes.vae.peak import vae_parameters
from pack.testing.fake_text_encoder import FakeTextEncoder
from pack.testing.stock_forward import FakeDenoiser
from pack.testing.vae_models import FakeVae

pytestmark = [
    pytest.mark.usefixtures("host"),
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs torch with CUDA"),
]


def test_elements_of_all_weights() -> None:
    transformer = FakeDenoiser().model.diffusion_model
    assert sum(p.numel() for p in transformer.parameters()) == Z_IMAGE.parameters
    for sizes, is_decoder in ((FLUX_DECODER, True), (FLUX_ENCODER, False)):
        part: Any = FakeVae(is_decoder=is_decoder).model
        assert sum(p.numel() for p in part.parameters()) == vae_parameters(sizes)
    assert FakeTextEncoder(QWEN3_4B.layers).parameters == QWEN3_4B.parameters


def test_peak_of_a_prompt() -> None:
    from pack.nodes.host.fit.inputs import models_here

    encoder, models = FakeTextEncoder(), models_here()
    for tokens in (1, 17, 256, 511):
        measured = encoder.measure(tokens).peak_bytes
        planned = text_stage(models, tokens).activation_bytes
        assert planned == pytest.approx(measured, rel=0.003), tokens
