"""The nodes of the low-VRAM workflow change no pixel: the same seed, over HTTP, PNG against PNG.

Other settings than the workflow's are compared by their latents: a decode takes five seconds.
"""

from __future__ import annotations

import copy
import uuid
from typing import Any, NamedTuple

import numpy as np
import pytest
from pack.runner.graphs import Picture
from pack.tests.e2e.conftest import TIMEOUT_S
from pack.tests.e2e.test_server import FILES, cached_nodes, pixels, prompt_for
from safetensors.numpy import load_file

# 288 tokens of the picture, so that a chunk of 256 is not all of it.
PICTURE = Picture(288, 256, steps=2, seed=11, text="a lighthouse in fog")
CHECKPOINT_NODE, SLICE_NODE, SAMPLER, LATENT = "9", "10", "5", "11"
PICTURE_NODES = ("6", "7")  # VAE Decode, Save Image
# As prompts of before `prefer` have it.
CHECKPOINT = {"blocks": "all", "chunk_tokens": 0, "head_groups": 0}
SLICE = {"mode": "auto", "slices": 0}


def with_low_vram(
    prompt: dict[str, Any],
    checkpoint: dict[str, Any] | None = CHECKPOINT,
    slices: dict[str, Any] | None = SLICE,
) -> dict[str, Any]:
    """The example prompt with the nodes of example_workflows/z_image_turbo_low_vram.json.

    Args:
        checkpoint: inputs of Apply Gradient Checkpoint; None leaves the node out.
        slices: inputs of Attention Slice; None leaves the node out.
    """
    prompt = copy.deepcopy(prompt)
    chain = (
        (CHECKPOINT_NODE, "ZImageGradientCheckpoint", checkpoint),
        (SLICE_NODE, "ZImageAttentionSlice", slices),
    )
    model = prompt[SAMPLER]["inputs"]["model"]
    for node_id, node_type, inputs in chain:
        if inputs is not None:
            prompt[node_id] = {"class_type": node_type, "inputs": {"model": model, **inputs}}
            model = [node_id, 0]
    prompt[SAMPLER]["inputs"]["model"] = model
    return prompt


class Drawn(NamedTuple):
    """What a prompt gave, sampled and not taken from the cache.

    latent: [1, 16, H/8, W/8], float32.
    picture: [H, W, 3], uint8; None where the prompt draws none.
    log: what the server logged meanwhile.
    """

    latent: np.ndarray
    picture: np.ndarray | None
    log: str


def draw(server, prompt: dict[str, Any], *, is_decoded: bool = True) -> Drawn:
    """Runs the prompt and saves its latent too; without `is_decoded` it draws no picture."""
    prompt = {i: node for i, node in prompt.items() if is_decoded or i not in PICTURE_NODES}
    save = {"samples": [SAMPLER, 0], "filename_prefix": uuid.uuid4().hex}
    prompt[LATENT] = {"class_type": "SaveLatent", "inputs": save}
    before = server.log_path.stat().st_size
    entry = server.wait(server.queue(prompt), TIMEOUT_S)
    assert SAMPLER not in cached_nodes(entry)
    log = server.log_path.read_bytes()[before:].decode("utf-8", "replace")
    (file,) = entry["outputs"][LATENT]["latents"]
    latent = load_file(server.base_dir / file["type"] / file["filename"])["latent_tensor"]
    return Drawn(latent, pixels(server, entry) if is_decoded else None, log)


@pytest.fixture(scope="module")
def plain(server) -> Drawn:
    drawn = draw(server, prompt_for(*FILES, PICTURE))
    assert "Apply Gradient Checkpoint" not in drawn.log
    assert "Attention Slice" not in drawn.log
    assert drawn.latent.shape == (1, 16, PICTURE.height // 8, PICTURE.width // 8)
    assert drawn.latent.std() > 0.1
    assert drawn.picture is not None
    assert drawn.picture.shape == (PICTURE.height, PICTURE.width, 3)
    assert drawn.picture.std() > 1, "a picture of one colour shows nothing"
    return drawn


CHUNKS = {**CHECKPOINT, "chunk_tokens": 256}


def _once(name: str, checkpoint: dict[str, Any] | None, slices: dict[str, Any] | None) -> Any:
    return pytest.param(checkpoint, slices, False, id=name, marks=pytest.mark.once)


# Neighbours differ in every node, else the host has the second one's node in its cache.
@pytest.mark.parametrize(
    ("checkpoint", "slices", "is_decoded"),
    [
        pytest.param(CHECKPOINT, SLICE, True, id="the workflow"),
        _once("checkpoint alone", CHUNKS, None),
        _once("slice alone", None, {"mode": "heads", "slices": 1}),
        _once("smallest pieces", {**CHUNKS, "head_groups": 3}, {"mode": "max", "slices": 0}),
        _once("every second", {**CHUNKS, "blocks": "every second"}, SLICE),
    ],
)
def test_latent_and_picture_are_the_same(server, plain, checkpoint, slices, is_decoded):
    prompt = with_low_vram(prompt_for(*FILES, PICTURE), checkpoint, slices)
    latent, picture, log = draw(server, prompt, is_decoded=is_decoded)
    assert latent.tobytes() == plain.latent.tobytes()
    if is_decoded:
        np.testing.assert_array_equal(picture, plain.picture)
    # Each node has told what it did, so it was not left out of the model.
    assert ("Apply Gradient Checkpoint: " in log) == (checkpoint is not None)
    assert ("Attention Slice: " in log) == (slices is not None)
    assert "not the forward around them" not in log, "a plain request takes the whole forward"


@pytest.mark.once
def test_another_seed_draws_another_picture(server, plain):
    drawn = draw(server, with_low_vram(prompt_for(*FILES, PICTURE._replace(seed=12))))
    assert (drawn.picture != plain.picture).any()
