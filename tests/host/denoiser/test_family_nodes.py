"""Other families behind Apply Gradient Checkpoint, beside other nodes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from pack.testing.family_calls import (
    Heard,
    Kept,
    forward,
    given,
)
from pack.testing.family_models import (
    FLUX,
    MAIN,
    NAMES,
    SMALL,
    WAN,
    built,
    hooked_layers,
)
from pack.testing.lean_models import assert_same, lean, sample, sliced

pytestmark = pytest.mark.usefixtures("host", "_one_thread")
EACH = [*FLUX, *(name for name in MAIN if name not in FLUX)]
WAN_MAIN = [name for name in MAIN if name in WAN]


@pytest.fixture(scope="module")
def models(host: Any) -> dict[str, Any]:
    return {name: built(name) for name in NAMES}


@pytest.mark.parametrize("mode", ["auto", "heads", "max"])
@pytest.mark.parametrize("name", EACH)
def test_attention_slice_in_either_order(models, name, mode):
    model = models[name]
    # Alone, "auto" would leave the two heads of FLUX.1 together.
    groups = {} if name in FLUX else {"head_groups": 0}
    for both in (lean(sliced(model, mode), **groups), sliced(lean(model, **groups), mode)):
        assert assert_same(model, both, **given(name)).heads == SMALL[name].heads


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


@pytest.mark.once
@pytest.mark.parametrize("name", MAIN)
def test_a_copy_with_weights_of_its_own(models, name):
    """As the host makes one for another GPU."""
    model = built(name)
    if not hasattr(type(model), "deepclone_multigpu"):
        pytest.skip("this host makes no such copies")
    ours = lean(model)
    copy = ours.deepclone_multigpu(torch.device("cpu"))
    assert copy.model is not ours.model
    parts = {n: p for n, p in copy.object_patches.items() if isinstance(p, torch.nn.Module)}
    assert parts
    for path, part in parts.items():
        assert part.stock[0] is copy.model.get_submodule(path)
    assert_same(model, copy, **given(name))
    with torch.no_grad():
        for weight in copy.model.diffusion_model.parameters():
            weight.mul_(1.01)
    assert not torch.equal(sample(copy, **given(name)).latent, sample(model, **given(name)).latent)
    assert_same(model, ours, **given(name))


@pytest.mark.parametrize("name", EACH)
def test_a_sampling_with_guidance(models, name):
    """Both halves of the batch, several steps."""
    asked = {**given(name), "cfg": 3.0, "steps": 2}
    assert_same(models[name], lean(models[name]), rounding=True, **asked)


def test_wan_with_frames_that_are_known():
    """Wan 2.2 5B keeps them by a mask, and gives them the time 0."""
    name = "Wan 2.2 5B"
    model, asked = built(name), given(name)
    mask = torch.ones(1, 1, *asked["noise"].shape[2:])
    mask[:, :, 0] = 0
    asked |= {"noise_mask": mask, "latent_image": 0.5 * asked["noise"]}
    heard = Heard(model)
    got = assert_same(model, heard.model, **asked)
    assert heard.reasons == []
    torch.testing.assert_close(got.latent[:, :, 0], asked["latent_image"][:, :, 0])


@pytest.mark.parametrize("is_first", [False, pytest.param(True, marks=pytest.mark.once)])
@pytest.mark.parametrize("name", WAN_MAIN)
def test_context_windows_of_the_host(models, name, is_first):
    """A video in windows of three frames of the latent, which overlap by one."""
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode as Node

    # Newer hosts can keep a picture's frame in each window.
    has_first = "retain_first_frame" in inspect.signature(Node.execute).parameters
    more = {"retain_first_frame": True} if has_first else {}

    def windowed(model: Any) -> Any:
        given = (9, 4, "standard_static", 1, False, "pyramid", True)
        return Node.execute(model, *given, **more).args[0]

    model, asked = models[name], given(name, frames=5)
    stock = windowed(model)
    ours = lean(stock) if is_first else windowed(lean(model))
    assert_same(stock, ours, **asked)
    frame = SMALL[name].sides[1] ** 2
    assert max(sample(model, **asked).queries) == 5 * frame
    assert max(sample(stock, **asked).queries) in (3 * frame, 4 * frame)  # the anchor's besides


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


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ChromaRadiance"])
@torch.inference_mode()
def test_what_a_hook_keeps_stays_as_it_was(models, name):
    """Names the bug: gates, shifts and activations were applied in the hook's own tensor."""
    model, kept = models[name], Kept()
    wanted = forward(model, name)
    heard = Heard(model)
    layers = list(hooked_layers(name, model))

    def keep(module: Any, given: Any, result: torch.Tensor) -> None:
        kept(() if name in FLUX else given, result)  # the host too writes over FLUX's streams

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        assert torch.equal(forward(heard.model, name), wanted) and heard.reasons == []
    finally:
        for handle in handles:
            handle.remove()
    assert len(kept.results) >= len(layers) and kept.is_unchanged


@pytest.mark.parametrize("name", EACH)
@torch.inference_mode()
def test_what_an_override_of_the_attention_returns_counts_and_stays_as_it_was(models, name):
    """Names the bug: what attended to a picture was added in the override's own tensor."""
    model, kept = models[name], Kept()

    def keeping(function: Any, *args: Any, **more: Any) -> torch.Tensor:
        result = 0.5 * function(*args, **more)
        kept((), result)
        return result

    options = {"transformer_options": {"optimized_attention_override": keeping}}
    wanted = forward(model, name, **options)
    assert not torch.equal(forward(model, name), wanted)
    count = len(kept.results)
    kept.results.clear()
    heard = Heard(model)
    assert torch.equal(forward(heard.model, name, **options), wanted) and heard.reasons == []
    assert len(kept.results) > count and kept.is_unchanged


@pytest.mark.parametrize("name", EACH)
@torch.inference_mode()
def test_a_sample_in_a_training_is_the_hosts(host, models, monkeypatch, name):
    """Names the bug: there the host rotates q and k with operations of its own."""
    monkeypatch.setattr(host.model_management, "in_training", True)
    heard = Heard(models[name])
    assert torch.equal(forward(heard.model, name), forward(models[name], name))
    assert set(heard.reasons) == {"a training runs"}
