"""Apply Gradient Checkpoint while training, and why training's method saves nothing in sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint
from pack.nodes.probe.tracker import PeakTracker
from pack.testing import lean_models
from pack.testing.lean_models import built, latent, lean, prompt
from pack.testing.loading import write_tiny_vae
from pack.testing.train_lora import train_lora

pytestmark = pytest.mark.usefixtures("host", "_one_thread")


@pytest.fixture
def training(host: Any) -> Iterator[None]:
    """As the host's training node; outside it, the host's fused norm has no gradient."""
    host.model_management.in_training = True
    yield
    host.model_management.in_training = False


@pytest.fixture
def z_image() -> Any:
    """Weights made with gradients possible, as the training node has them."""
    return built("ZImage", {**lean_models.Z_IMAGE, "n_layers": 8})


@contextmanager
def installed(host: Any, model: Any) -> Iterator[torch.nn.Module]:
    """The transformer with the model's patches in place."""
    host.model_management.load_models_gpu([model])
    yield model.model.diffusion_model


@contextmanager
def host_checkpointing(denoiser: torch.nn.Module, depth: int) -> Iterator[None]:
    """The host's own gradient checkpointing, as its Train LoRA node switches it on."""
    from comfy_extras.nodes_train import find_modules_at_depth, patch, unpatch

    modules = find_modules_at_depth(denoiser, depth=depth)
    assert modules
    for module in modules:
        patch(module)
    try:
        yield
    finally:
        for module in modules:
            unpatch(module)


def forward(host: Any, model: Any, *, dropout: float = 0.0) -> torch.Tensor:
    """One call with gradients on and what sampling hands to the transformer."""
    import comfy.model_patcher
    import comfy.sampler_helpers

    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    comfy.sampler_helpers.prepare_model_patcher(model, {}, options)
    if dropout:
        options["transformer_options"]["optimized_attention_override"] = (
            lambda function, *args, **kwargs: torch.nn.functional.dropout(
                function(*args, **kwargs), dropout
            )
        )
    context = prompt()[0][0]
    return model.model.diffusion_model(
        latent(24).requires_grad_(),
        torch.tensor([0.4]),
        context,
        context.shape[1],
        transformer_options=options["transformer_options"],
    )


def gradients(host: Any, model: Any, **options: Any) -> dict[str, torch.Tensor]:
    denoiser = model.model.diffusion_model
    denoiser.requires_grad_()
    torch.manual_seed(3)
    forward(host, model, **options).square().mean().backward()
    # A lean block's layers are the block's own, so the names are the same.
    found = {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad(set_to_none=True)
    assert found and any(grad.abs().max() > 0 for grad in found.values())
    return found


class Kept(NamedTuple):
    """Live bytes after the forward, output aside, and the peak of forward and backward."""

    after_forward: int
    peak: int


def kept_bytes(host: Any, model: Any) -> Kept:
    """Counts live storages: checkpoint's own saved inputs are unseen by saved-tensor hooks."""
    model.model.diffusion_model.requires_grad_(False)  # as in LoRA training, the input's path only
    with PeakTracker() as tracker:
        out = forward(host, model)
        kept = tracker.current_bytes - out.untyped_storage().nbytes()
        out.square().mean().backward()
    return Kept(kept, tracker.peak_bytes)


@pytest.mark.parametrize(
    ("depth", "dropout"),
    [
        (0, 0.0),
        (1, 0.2),
        *(
            pytest.param(*case, marks=pytest.mark.once)
            for case in [(0, 0.2), (1, 0.0), (2, 0.0), (2, 0.2)]
        ),
    ],
)
def test_gradients_are_those_without_checkpointing(host, z_image, training, depth, dropout):
    """With the host's own checkpointing off (depth 0) and on; dropout needs the same RNG state."""
    with installed(host, z_image):
        wanted = gradients(host, z_image, dropout=dropout)
    if dropout:
        with installed(host, z_image):
            plain = gradients(host, z_image)
        assert any(not torch.equal(plain[n], wanted[n]) for n in wanted)
    ours = lean(z_image)
    with (
        host_checkpointing(z_image.model.diffusion_model, depth) if depth else nullcontext(),
        installed(host, ours),
    ):
        got = gradients(host, ours, dropout=dropout)
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_bytes_kept_for_the_backward_pass(host, z_image, training):
    """The host's depth 2 is the blocks; its depth 1 is the whole model at once, which keeps
    nothing and then recomputes everything, so that its peak is that of no checkpointing."""
    with installed(host, z_image) as denoiser:
        stock = kept_bytes(host, z_image)
        with host_checkpointing(denoiser, 2):
            host_blocks = kept_bytes(host, z_image)
        with host_checkpointing(denoiser, 1):
            host_whole = kept_bytes(host, z_image)
    ours = lean(z_image)
    with installed(host, ours):
        kept = kept_bytes(host, ours)
    assert kept.after_forward <= stock.after_forward / 5
    assert kept.after_forward <= 1.02 * host_blocks.after_forward
    assert kept.peak <= 1.02 * host_blocks.peak
    assert kept.peak < host_whole.peak / 3


def test_checkpointing_as_in_training_saves_nothing_in_sampling(host, z_image):
    """The row that the node's text speaks of: 0 bytes, the same output."""
    host.model_management.load_models_gpu([z_image])
    denoiser = z_image.model.diffusion_model

    def peak(call: Callable[..., torch.Tensor]) -> tuple[int, torch.Tensor]:
        context = prompt()[0][0]
        with torch.inference_mode(), PeakTracker() as tracker:
            out = call(latent(24), torch.tensor([0.4]), context, 7, transformer_options={})
        return tracker.peak_bytes, out

    def checkpointed(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(denoiser, *args, use_reentrant=False, **kwargs)

    (stock, wanted), (tried, got) = peak(denoiser), peak(checkpointed)
    assert tried == stock
    assert torch.equal(got, wanted)
    with host_checkpointing(denoiser, 2):
        blocks, got = peak(denoiser)
    assert blocks >= stock
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bypass_mode": True}],
    ids=["plain", "host checkpointing", "bypass"],
)
def test_train_lora_of_the_host(host, small_folder: Path, options):
    from pack.nodes.load_model import LoadZImageTurbo

    same = "from the same folder"  # not in inference mode: old hosts train these very weights
    vae = write_tiny_vae(host).name
    model = LoadZImageTurbo.execute(f"{small_folder.name}/", same, vae).args[0]
    wanted = train_lora(model, latent(16, seed=2), prompt(), **options)
    before = {n: frozenset(vars(m)) for n, m in model.model.named_modules()}
    got = train_lora(lean(model), latent(16, seed=2), prompt(), **options)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name] - tensor).norm() <= 1e-6 * tensor.norm() + 1e-9, name
    assert any(tensor.abs().max() > 0 for name, tensor in got.items() if "lora_up" in name)
    host.model_management.load_models_gpu([model])
    left = [
        n
        for n, m in model.model.named_modules()
        if {"org_forward"} & (frozenset(vars(m)) - before[n])
    ]
    assert left == []
