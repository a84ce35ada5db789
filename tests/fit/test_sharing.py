"""What the next picture fetches again."""

from __future__ import annotations

from dataclasses import replace

from pack.nodes.fit.sharing import shared
from pack.nodes.fit.stage import Stage

MODEL = Stage(
    "denoise", "", weight_bytes=0, buffer_bytes=20, activation_bytes=0, stock_bytes=0,
    workspace_bytes=0, is_repeated=True,
)  # fmt: skip
TEXT, DENOISE, DECODE = (
    replace(MODEL, name=name, weight_bytes=weights, activation_bytes=live, is_repeated=repeated)
    for name, weights, live, repeated in (
        ("text", 75, 5, False), ("denoise", 115, 5, True), ("decode", 2, 50, False),
    )
)  # fmt: skip
STAGES = TEXT, DENOISE, DECODE


def fetched_again(budget_bytes: int | None) -> dict[str, int]:
    return {name: found.again for name, found in shared(STAGES, budget_bytes).items()}


def test_nothing_where_all_have_room():
    assert fetched_again(None) == fetched_again(242) == dict.fromkeys(
        ("text", "denoise", "decode"), 0
    )  # fmt: skip


def test_the_model_used_longest_ago_leaves_first():
    # At 200 the decode, which takes 52, moves 42 of the text encoder's 75 away.
    assert fetched_again(200) == {"text": 42, "denoise": 0, "decode": 0}
    # At 155 denoise leaves 35 of the text encoder, decode those 35 and 12 of the denoiser; the next
    # text takes 30 more of the denoiser, the next denoise the decoder and 40 of the text encoder.
    assert fetched_again(155) == {"text": 75, "denoise": 42, "decode": 2}


def test_what_is_streamed_once_counts_and_what_each_step_streams_does_not():
    # 60: each model alone is too large. Text and denoise keep 35 of their weights.
    assert fetched_again(60) == {"text": 75, "denoise": 35, "decode": 2}
