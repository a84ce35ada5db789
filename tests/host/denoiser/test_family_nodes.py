"""Qwen-Image and Wan behind Apply Gradient Checkpoint, beside other nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.testing.family_models import SMALL, Heard, built, forward, given, hooked_layers
from pack.testing.lean_models import assert_same, lean, sample, sliced

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
NAMES = ("Qwen-Image", "Wan", "Wan i2v")


@pytest.fixture(scope="module")
def models(host: Any) -> dict[str, Any]:
    return {name: built(name) for name in SMALL}


@pytest.mark.parametrize("mode", ["auto", "heads", "max"])
@pytest.mark.parametrize("name", NAMES)
def test_attention_slice_in_either_order(models, name, mode):
    model = models[name]
    heads = {1} if name == "Qwen-Image" else {1, 2}  # that attend to the text
    for both in (
        lean(sliced(model, mode), head_groups=0), sliced(lean(model, head_groups=0), mode)
    ):  # fmt: skip
        assert assert_same(model, both, **given(name)).heads == heads


@pytest.mark.parametrize("name", NAMES)
def test_clones_side_by_side(models, name):
    model = models[name]
    wanted = sample(model, **given(name)).latent
    ours, other = lean(model), lean(model, blocks="main layers", chunk_tokens=320)
    whole = max(sample(model, **given(name)).queries)
    for patched, is_whole in [
        (ours, False), (model, True), (ours.clone().clone(), False), (other, False),
        (model.clone(), True), (ours, False), (lean(other), False),
    ]:  # fmt: skip
        run = sample(patched, **given(name))
        assert torch.equal(run.latent, wanted)
        assert (max(run.queries) == whole) == is_whole


@pytest.mark.parametrize("name", NAMES)
def test_a_sampling_with_guidance(models, name):
    """Both halves of the batch, several steps."""
    asked = {**given(name), "cfg": 3.0, "steps": 2}
    assert_same(models[name], lean(models[name]), rounding=True, **asked)


@pytest.mark.slow
@pytest.mark.parametrize("comes_first", [False, pytest.param(True, marks=pytest.mark.once)])
@pytest.mark.parametrize("name", NAMES)
def test_torch_compile_of_the_host(models, name, comes_first):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = models[name]

    def compiled(model: Any) -> Any:
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="aot_eager")
        return clone

    wanted = sample(model, **given(name)).latent
    ours = lean(compiled(model)) if comes_first else compiled(lean(model))
    try:
        with torch.no_grad():
            runs = [sample(ours, **given(name)) for _ in range(2)]
    finally:
        torch.compiler.reset()
    for run in runs:
        assert (run.latent - wanted).norm() / wanted.norm() < 1e-5
    assert torch.equal(sample(model, **given(name)).latent, wanted)


class Kept:
    """A hook that keeps what its layer returned, in order."""

    def __init__(self) -> None:
        self.results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, module: Any, given: Any, result: torch.Tensor) -> None:
        self.results += [(held, held.clone()) for held in (*given, result)]


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_what_a_hook_keeps_stays_as_it_was(models, name):
    """Names the bug: the text's gate was applied in the hook's own tensor."""
    model, kept = models[name], Kept()
    wanted = forward(model)
    heard = Heard(model)
    layers = list(hooked_layers(name, model))
    handles = [layer.register_forward_hook(kept) for layer in layers]
    try:
        assert torch.equal(forward(heard.model), wanted) and heard.reasons == []
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept.results) >= len(layers)
    assert all(torch.equal(now, then) for now, then in kept.results)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_what_an_override_of_the_attention_keeps_stays_as_it_was(models, name):
    """Names the bug: what attended to a picture was added in the override's own tensor."""
    model, kept = models[name], Kept()

    def keeping(function: Any, *args: Any, **more: Any) -> torch.Tensor:
        result = function(*args, **more)
        kept(None, (), result)
        return result

    options = {"transformer_options": {"optimized_attention_override": keeping}}
    wanted = forward(model)
    kept.results.clear()
    assert torch.equal(forward(lean(model), **options), wanted)
    assert kept.results and all(torch.equal(now, then) for now, then in kept.results)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_a_sample_in_a_training_is_the_hosts(host, models, monkeypatch, name):
    monkeypatch.setattr(host.model_management, "in_training", True)
    heard = Heard(models[name])
    assert torch.equal(forward(heard.model), forward(models[name]))
    assert set(heard.reasons) == {"a training runs"}


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_samples_that_share_a_time_are_the_hosts(models, name):
    """Names the bug: the second sample's time was looked for, and not found."""
    model, heard = models[name], Heard(models[name])
    times = torch.full((1,), 0.7)
    wanted = forward(model, batch=2, times=times)
    assert torch.equal(forward(heard.model, batch=2, times=times), wanted)
    assert set(heard.reasons) == {"samples share a time"}
