"""Z-Image's shape arithmetic, against figures worked out by hand and against the host's rules."""

from __future__ import annotations

import pytest
from pack.nodes.denoiser.sizes import Z_IMAGE, Request, TransformerSizes, round_up

MIB = 2**20


@pytest.mark.parametrize(
    ("width", "height", "batch", "stream_mib"),
    [
        (1024, 1024, 1, 31.875),
        (512, 512, 4, 37.5),
        (2048, 2048, 1, 121.875),
        (1024, 1024, 4, 127.5),
        (4096, 4096, 1, 481.875),
    ],
)
def test_one_residual_stream_in_bfloat16(
    width: int, height: int, batch: int, stream_mib: float
) -> None:
    assert Request(width, height, batch).stream_bytes == stream_mib * MIB


def test_tokens_are_padded_apart_for_image_and_text() -> None:
    # 1000 x 520 px -> latent 125 x 65 -> 63 x 33 patches = 2079 -> 2080; 33 words -> 64.
    request = Request(1000, 520, text_tokens=33)
    assert request.latent_shape == (1, 16, 65, 125)
    assert request.image_tokens == 2079
    assert request.padded_image_tokens == 2080
    assert request.padded_text_tokens == 64
    assert request.tokens == 2144


def test_full_multiples_get_no_padding() -> None:
    request = Request(1024, 1024, text_tokens=32)
    assert (request.padded_image_tokens, request.padded_text_tokens) == (4096, 32)


def test_float32_doubles_the_stream() -> None:
    assert Request(512, 512, dtype_bytes=4).stream_bytes == 2 * Request(512, 512).stream_bytes


def test_widths_of_z_image() -> None:
    assert Z_IMAGE.qkv_dim == 11520
    assert Z_IMAGE.patch_dim == 64
    request = Request(1024, 1024)
    assert request.rope_bytes == 4352 * 64 * 2 * 2 * 4


def test_a_batch_shares_one_rope_table() -> None:
    assert Request(512, 512, 4).rope_bytes == Request(512, 512, 1).rope_bytes


@pytest.mark.parametrize(("count", "expected"), [(1, 32), (32, 32), (33, 64)])
def test_round_up(count: int, expected: int) -> None:
    assert round_up(count, 32) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width_px": 7}, "width_px must be >= 8, got 7"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"text_tokens": 0}, "text_tokens must be >= 1, got 0"),
    ],
)
def test_a_request_says_what_it_refuses(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"width_px": 64, "height_px": 64, **fields})


def test_sizes_must_fit_together() -> None:
    with pytest.raises(ValueError, match="heads x head_dim must be dim, got 2 x 128 != 3840"):
        TransformerSizes(heads=2)
