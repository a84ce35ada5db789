"""The host's stock forward on fake tensors: the figures that the lean forward is measured against.

The expected bytes are worked out from the host's code. The peak stands in a feed-forward, at the
product of silu(w1 x) and w3 x: four hidden tensors, the modulated input and the block's own sum,
beside what the frames above hold.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pack.nodes.denoiser.sizes import Z_IMAGE, Request
from pack.testing.stock_forward import FakeDenoiser, unet_config

CASES = [
    Request(1024, 1024),
    Request(512, 512, 4),
    Request(2048, 2048),
    Request(1024, 1024, 4),
    Request(4096, 4096),
]


@pytest.fixture(scope="module")
def denoiser(host: Any) -> FakeDenoiser:
    return FakeDenoiser(dataclasses.replace(Z_IMAGE, layers=2))


def _small_bytes(request: Request) -> int:
    """Latent and its padded copy, text, noise level, its embedding, four modulations and a gate."""
    _, channels, height, width = request.latent_shape
    latent = 2 * channels * height * width * 2
    text = request.text_tokens * Z_IMAGE.cap_dim * 2
    return request.batch * (latent + text + 4 + 256 * 2 + (4 + 1) * Z_IMAGE.dim * 2)


def _main_block_bytes(request: Request) -> int:
    """A main block past the first; _forward holds the first one's input and this one's."""
    hidden = request.batch * request.tokens * Z_IMAGE.ffn_dim * 2
    return 4 * hidden + 4 * request.stream_bytes + request.rope_bytes


def _refiner_bytes(request: Request) -> int:
    """The second image refiner; patchify_and_embed holds the embedding twice, and the text."""
    token_bytes = request.batch * Z_IMAGE.dim * 2
    image = request.padded_image_tokens
    hidden = 4 * image * request.batch * Z_IMAGE.ffn_dim * 2
    held = 5 * image * token_bytes + 2 * request.padded_text_tokens * token_bytes
    return hidden + held + 2 * request.rope_bytes


@pytest.mark.parametrize("request_", CASES, ids=str)
def test_stock_peak(denoiser: FakeDenoiser, request_: Request) -> None:
    tracker = denoiser.measure(request_)
    held = max(_main_block_bytes(request_), _refiner_bytes(request_))
    assert tracker.peak_bytes == held + _small_bytes(request_)
    assert tracker.peak_op == "aten.mul.Tensor"


def test_all_layers_peak_as_two_do(denoiser: FakeDenoiser) -> None:
    whole = FakeDenoiser().measure(CASES[1])
    assert whole.peak_bytes == denoiser.measure(CASES[1]).peak_bytes


def test_through_apply_model_the_float32_latent_comes_on_top(denoiser: FakeDenoiser) -> None:
    model, apply = (denoiser.measure(CASES[0], route=route) for route in ("model", "apply"))
    latent_bytes = 16 * 128 * 128 * 4
    assert 0 <= apply.peak_bytes - model.peak_bytes - latent_bytes < 1024


def test_stock_calls_repeat_their_allocations(denoiser: FakeDenoiser) -> None:
    first, second = (denoiser.measure(CASES[0], log=True) for _ in range(2))
    assert first.sequence() == second.sequence()
    assert len(first.sequence()) > 100


def test_math_attention_holds_scores(denoiser: FakeDenoiser) -> None:
    flash = denoiser.measure(CASES[0], attention="flash")
    math = denoiser.measure(CASES[0], attention="math")
    assert flash.peak_bytes == denoiser.measure(CASES[0]).peak_bytes
    # Scores and softmax, in bfloat16 as the host allows, and a byte each to find empty rows.
    scores_bytes = 30 * 4352 * 4352 * (2 + 2 + 1)
    assert scores_bytes < math.peak_bytes < scores_bytes + 10 * CASES[0].stream_bytes


def test_checkpoint_as_in_training_saves_nothing(denoiser: FakeDenoiser) -> None:
    from torch.utils.checkpoint import checkpoint

    def around(call: Any) -> Any:
        return lambda *args, **kwargs: checkpoint(call, *args, use_reentrant=False, **kwargs)

    stock = denoiser.measure(CASES[0])
    assert denoiser.measure(CASES[0], around=around).peak_bytes >= stock.peak_bytes


def test_patches_of_a_patcher_are_in_place_for_the_call_only(denoiser: FakeDenoiser) -> None:
    import comfy.patcher_extension

    seen = []

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(executor.class_obj.final_layer.linear))
        return executor(*args, **kwargs)

    class Spy(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    linear = denoiser.model.diffusion_model.final_layer.linear
    patched = denoiser.patcher().clone()
    patched.add_object_patch("diffusion_model.final_layer.linear", Spy(linear))
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    patched.add_wrapper_with_key(kind, "spy", wrapper)
    denoiser.measure(CASES[1], patcher=patched)
    denoiser.measure(CASES[1])
    assert seen == [Spy]
    assert denoiser.model.diffusion_model.final_layer.linear is linear


def test_the_hosts_detection_names_the_same_sizes(denoiser: FakeDenoiser) -> None:
    import comfy.model_detection

    with denoiser.mode:
        found = comfy.model_detection.detect_unet_config(
            denoiser.model.diffusion_model.state_dict(), ""
        )
    expected = unet_config(denoiser.sizes)
    del expected["n_refiner_layers"]  # the class' own default, which no file changes
    assert found == expected
