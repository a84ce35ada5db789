"""FLUX.1 and FLUX.2 behind Apply Gradient Checkpoint, beside other nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pack.testing.flux_models import CONFIGS, MAIN, built, forward, given, lean
from pack.testing.lean_models import assert_same, sample, sliced

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.fixture(scope="module")
def models(host: Any) -> dict[str, Any]:
    return {name: built(name) for name in CONFIGS}


@pytest.mark.parametrize("mode", ["auto", "heads", "max"])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_slice_in_either_order(models, name, mode):
    model = models[name]
    for both in (lean(sliced(model, mode)), sliced(lean(model), mode)):
        assert assert_same(model, both, **given(name)).heads == {1}


@pytest.mark.parametrize("name", MAIN)
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


@pytest.mark.slow
@pytest.mark.parametrize("comes_first", [False, pytest.param(True, marks=pytest.mark.once)])
@pytest.mark.parametrize("name", MAIN)
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
        self.results.append((result, result.clone()))


@pytest.mark.parametrize("name", MAIN)
@torch.inference_mode()
def test_what_a_hook_keeps_stays_as_it_was(models, name):
    """Names the bug: gates, shifts and activations were applied in the hook's own tensor."""
    model, kept = models[name], Kept()
    wanted = forward(model, name)
    double, single = (
        getattr(model.model.diffusion_model, stack)[0]
        for stack in ("double_blocks", "single_blocks")
    )
    layers = [
        double.img_norm1, double.txt_attn.qkv, double.img_attn.proj, double.img_mlp[0],
        double.txt_mlp[2], single.pre_norm, single.linear1, single.linear2,
    ]  # fmt: skip
    handles = [layer.register_forward_hook(kept) for layer in layers]
    try:
        assert torch.equal(forward(lean(model), name), wanted)
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept.results) >= len(layers)
    assert all(torch.equal(now, then) for now, then in kept.results)


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_a_sample_in_a_training_is_the_hosts(host, models, monkeypatch, name):
    """Names the bug: there the host rotates q and k with operations of its own."""
    monkeypatch.setattr(host.model_management, "in_training", True)
    model = models[name]
    ours, reasons = lean(model), []
    for part in ours.object_patches.values():
        part._on_handover = reasons.append
    assert torch.equal(forward(ours, name), forward(model, name))
    assert set(reasons) == {"a training runs"}
