"""The layers of a video VAE over strips against their oracles on whole videos."""

from __future__ import annotations

import pytest
import torch
from pack.nodes.vae.video.sizes import Kind
from pack.testing.video_parts import CHANNELS, WIDTH, Made, in_strips

# The second has a last strip of one row.
HEIGHTS = [(8, 8), (9, 4), (7, 100), (6, 1), (8, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["point", "conv", "block", "up", "down", "time_up", "time_down"])
@torch.inference_mode()
def test_each_layer_equals_its_oracle(kind: Kind, dtype: torch.dtype) -> None:
    made = Made(kind, dtype)
    # Of a product and of each norm, bfloat16 keeps 8 bits.
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for frames in (1, 5):
        for height, rows in HEIGHTS:
            if kind == "down":
                height += height % 2
            x = torch.randn(1, CHANNELS, frames, height, WIDTH + 1).to(dtype)
            wanted = made.oracle(x)
            for is_decoder in (True, False):
                if is_decoder == (kind == "down") and kind in ("up", "down"):
                    continue
                result = in_strips([made], x, rows, is_decoder=is_decoder)
                assert result.shape == wanted.shape
                assert (result - wanted).norm() < bound * wanted.norm()


@torch.inference_mode()
def test_strips_are_bit_for_bit_those_of_one_strip() -> None:
    made = Made("block", torch.bfloat16)
    x = torch.randn(1, CHANNELS, 3, 19, 8).bfloat16()
    whole = in_strips([made], x, 19, is_decoder=True)
    for rows in (1, 2, 5, 18):
        assert torch.equal(in_strips([made], x, rows, is_decoder=True), whole)


@torch.inference_mode()
def test_a_block_leaves_what_it_is_given() -> None:
    made = Made("block", torch.float32)
    x = torch.randn(1, CHANNELS, 3, 8, 8)
    before = x.clone()
    in_strips([made], x, 3, is_decoder=True)
    assert torch.equal(x, before)
