"""Attention Slice in a whole sampling of the host, with two model families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pack.testing import attention_models as models

pytestmark = pytest.mark.usefixtures("host", "_one_thread")

SETTINGS = [("auto", 0), ("heads", 0), ("heads", 1), ("queries", 64), ("max", 0)]


@pytest.fixture(scope="module")
def stable_diffusion(host: Any) -> Any:
    return models.stable_diffusion()


@pytest.fixture(scope="module")
def z_image(small_folder: Path) -> Any:
    from pack.nodes.load_model import LoadZImageTurbo

    same = "from the same folder"
    with torch.inference_mode():
        return LoadZImageTurbo.execute(f"{small_folder.name}/", same, same).args[0]


def _sample_z_image(model: Any) -> torch.Tensor:
    width = model.model.diffusion_model.cap_embedder[0].weight.shape[0]
    return models.sample(model, channels=16, width=width)


@pytest.mark.parametrize(("mode", "size"), SETTINGS)
def test_stable_diffusion_gives_the_same_latent(
    stable_diffusion: Any, mode: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    wanted = models.sample(stable_diffusion)
    got = models.sample(models.sliced(stable_diffusion, mode, size))
    if mode == "queries":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, wanted)
    assert wanted.isfinite().all() and wanted.std() > 0
    at_a_time = "of 4 heads at a time" if mode != "queries" else "of 384 queries at a time"
    assert (at_a_time in caplog.text) == (mode != "auto")  # so small: auto leaves it whole


@pytest.mark.parametrize(("mode", "size"), SETTINGS)
def test_z_image_gives_the_same_latent(z_image: Any, mode: str, size: int) -> None:
    wanted = _sample_z_image(z_image)
    got = _sample_z_image(models.sliced(z_image, mode, size))
    if mode == "queries":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, wanted)
    assert wanted.isfinite().all() and wanted.std() > 0


def test_clones_side_by_side_do_not_touch_one_another(
    stable_diffusion: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    wanted = models.sample(stable_diffusion)
    patched = models.sliced(stable_diffusion, "max")
    for model in (stable_diffusion, patched, stable_diffusion.clone(), patched.clone()):
        caplog.clear()
        assert torch.equal(models.sample(model), wanted)
    # The last clone shares the node's text with the second: its slices are no news.
    assert "at a time" not in caplog.text


def test_an_exception_in_mid_forward_leaves_nothing_patched(stable_diffusion: Any) -> None:
    wanted = models.sample(stable_diffusion)
    clone = stable_diffusion.clone()
    calls = 0

    def fails(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise RuntimeError("in the middle")
        return function(*args, **kwargs)

    clone.model_options["transformer_options"]["optimized_attention_override"] = fails
    patched = models.sliced(clone, "max")
    with pytest.raises(RuntimeError, match="in the middle"):
        models.sample(patched)
    for model in (stable_diffusion, patched):
        assert torch.equal(models.sample(model), wanted)


def test_both_orders_with_the_hosts_own_attention_patches(stable_diffusion: Any) -> None:
    """attn1_patch works on whole q, k, v before the override, whichever node came first."""

    def scaled(q: Any, k: Any, v: Any, extra_options: Any) -> Any:
        return q * 0.5, k, v * 1.5

    plain = stable_diffusion.clone()
    plain.set_model_attn1_patch(scaled)
    wanted = models.sample(plain)
    after = models.sliced(plain, "max")
    before = models.sliced(stable_diffusion, "max").clone()
    before.set_model_attn1_patch(scaled)
    assert not torch.equal(wanted, models.sample(stable_diffusion))
    for model in (after, before):
        assert torch.equal(models.sample(model), wanted)


def test_says_so_when_it_was_replaced(
    stable_diffusion: Any, caplog: pytest.LogCaptureFixture
) -> None:
    patched = models.sliced(stable_diffusion, "max")
    models.sample(patched)  # what was asked here does not count later
    replaced = patched.clone()
    options = replaced.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda function, *a, **kw: function(*a, **kw)
    wanted = models.sample(stable_diffusion)
    for _ in range(2):
        assert torch.equal(models.sample(replaced), wanted)
    warnings = [r.message for r in caplog.records if r.levelname == "WARNING"]
    warnings = [message for message in warnings if message.startswith("Attention Slice")]
    assert len(warnings) == 1 and "nothing was sliced: BaseModel has no place" in warnings[0]


def test_says_nothing_of_the_kind_when_it_was_asked(
    stable_diffusion: Any, caplog: pytest.LogCaptureFixture
) -> None:
    models.sample(models.sliced(stable_diffusion, "auto"))
    assert "nothing was sliced: " not in caplog.text


def test_the_text_names_the_groups_of_the_lean_block(
    z_image: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    models.sliced(z_image, "auto")
    assert "with Apply Gradient Checkpoint, q, k and v of 10 heads at a time" in caplog.text


@pytest.mark.parametrize("mode", ["auto", "max"])
def test_compiles_without_a_graph_break(stable_diffusion: Any, mode: str) -> None:
    import comfy.ldm.modules.attention as attention

    options = models.sliced(stable_diffusion, mode).model_options["transformer_options"]

    def call(q: torch.Tensor) -> torch.Tensor:
        return attention.attention_pytorch(q, q, q, 4, transformer_options=options)

    q = torch.randn(1, 96, 128, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q), call(q))
    torch.compiler.reset()


def test_gradients_are_those_of_the_whole_call(stable_diffusion: Any) -> None:
    """As in the host's training node: the forward runs with gradients on."""
    import comfy.ldm.modules.attention as attention

    options = models.sliced(stable_diffusion, "max").model_options["transformer_options"]
    q, k, v = (
        torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(i)).requires_grad_()
        for i in range(3)
    )

    def gradients(**kwargs: Any) -> tuple[torch.Tensor, ...]:
        out = attention.attention_sub_quad(q, k, v, 4, **kwargs)
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    torch.testing.assert_close(gradients(transformer_options=options), gradients())
