"""The lean block and the lean forward compute the host's bits: batch 1, chunks of 256 and more.

With other batch sizes matrix products have other shapes, and last bits differ.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.nodes.prefer import PREFERENCES, Prefer
from pack.testing import lean_models
from PIL import Image

pytestmark = pytest.mark.usefixtures("host")

HEADS, CHANNELS, TOKENS, CHUNK = 5, 128, 704, 256
DTYPES = [torch.float32, torch.bfloat16]
BACKENDS = ["attention_pytorch", "attention_sub_quad"]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).double().norm() / wanted.double().norm()).item()


def _settings(*, groups: int = 2, chunk: int = CHUNK, prefer: Prefer = "balance") -> Any:
    from pack.nodes.denoiser.plan import DenoiserChoice
    from pack.nodes.denoiser.sizes import Z_IMAGE
    from pack.nodes.host.denoiser.block import BlockSettings

    return BlockSettings(Z_IMAGE, DenoiserChoice(prefer, groups, chunk))


def _options(backend: str) -> tuple[dict[str, Any], list[int]]:
    """Options that choose the backend for every call, and the number of heads it was asked for."""
    from comfy.ldm.modules import attention

    asked: list[int] = []

    def override(_: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(q.shape[1])
        kwargs.pop("transformer_options")  # else the backend would ask for the override again
        return getattr(attention, backend)(q, *args, **kwargs)

    return {"optimized_attention_override": override}, asked


def _fill(module: torch.nn.Module, *, std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)


def _block(dtype: torch.dtype, *, has_modulation: bool = True, kv_heads: int = HEADS) -> Any:
    import comfy.ldm.lumina.model as lumina
    import comfy.ops

    block = lumina.JointTransformerBlock(
        0, HEADS * CHANNELS, HEADS, kv_heads, 256, 8 / 3, 1e-5, True,
        modulation=has_modulation, z_image_modulation=True,
        operation_settings={
            "operations": comfy.ops.disable_weight_init, "device": "cpu", "dtype": dtype,
        },
    ).eval()  # fmt: skip
    _fill(block)
    return block


def _rope(tokens: int) -> torch.Tensor:
    from comfy.ldm.flux.layers import EmbedND

    ids = torch.stack([torch.arange(tokens) // 3, torch.arange(tokens) % 29, torch.arange(tokens)])
    embedder = EmbedND(dim=CHANNELS, theta=256.0, axes_dim=[32, 48, 48])
    return embedder(ids.T[None].float()).movedim(1, 2)


def _both(block: Any, x: torch.Tensor, backend: str, settings: Any, **more: Any) -> Any:
    """The host's result and ours; x must stay as it is."""
    from pack.nodes.host.denoiser.block import LeanBlock

    rows = more.pop("rows", x.shape[0])
    adaln = (_draw(rows, 256, seed=2, dtype=x.dtype),) if block.modulation else ()
    before, table = x.clone(), _rope(x.shape[1])
    options, asked = _options(backend)
    wanted = block(x.clone(), None, table, *adaln, transformer_options=options, **more)
    asked.clear()
    lean = LeanBlock(block, settings)
    got = lean(x, None, table, *adaln, transformer_options=options, **more)
    assert torch.equal(x, before)
    assert got.data_ptr() != x.data_ptr() and got.dtype == wanted.dtype
    assert wanted.isfinite().all() and _relative(wanted, x) > 1e-2  # the block did something
    return wanted, got, asked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("groups", "heads"), [(1, {5}), (2, {3, 2}), (5, {1}), (100, {1})])
def test_block_has_the_hosts_bits(
    dtype: torch.dtype, backend: str, groups: int, heads: set[int]
) -> None:
    x = _draw(1, TOKENS, HEADS * CHANNELS, seed=1, dtype=dtype)
    wanted, got, asked = _both(_block(dtype), x, backend, _settings(groups=groups))
    assert torch.equal(got, wanted)
    assert set(asked) == heads


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [320, 512, 4096])
def test_block_has_the_hosts_bits_in_larger_chunks(dtype: torch.dtype, chunk: int) -> None:
    x = _draw(1, TOKENS, HEADS * CHANNELS, seed=1, dtype=dtype)
    wanted, got, _ = _both(_block(dtype), x, BACKENDS[0], _settings(chunk=chunk))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 255, 257, 449, 1000])
def test_block_has_the_hosts_bits_at_any_length(dtype: torch.dtype, tokens: int) -> None:
    x = _draw(1, tokens, HEADS * CHANNELS, seed=1, dtype=dtype)
    wanted, got, _ = _both(_block(dtype), x, BACKENDS[0], _settings())
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_block_without_modulation(dtype: torch.dtype, backend: str) -> None:
    x = _draw(1, TOKENS, HEADS * CHANNELS, seed=1, dtype=dtype)
    wanted, got, _ = _both(_block(dtype, has_modulation=False), x, backend, _settings())
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 5])
def test_block_whose_query_heads_share_keys(dtype: torch.dtype, groups: int) -> None:
    x = _draw(1, TOKENS, HEADS * CHANNELS, seed=1, dtype=dtype)
    wanted, got, _ = _both(_block(dtype, kv_heads=1), x, BACKENDS[0], _settings(groups=groups))
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runs", [[(300, 704)], [(300, 600), (0, 40)]], ids=str)
def test_block_with_two_timesteps(dtype: torch.dtype, runs: list[tuple[int, int]]) -> None:
    """Z-Image Omni: runs of tokens take the modulation of the second half of the batch."""
    x = _draw(1, TOKENS, HEADS * CHANNELS, seed=1, dtype=dtype)
    wanted, got, _ = _both(
        _block(dtype), x, BACKENDS[0], _settings(), timestep_zero_index=runs, rows=2
    )
    assert torch.equal(got, wanted)
    plain, _, _ = _both(_block(dtype), x, BACKENDS[0], _settings())
    assert not torch.equal(plain, wanted)


@pytest.mark.parametrize("runs", [None, [(300, 704)]], ids=str)
def test_block_with_a_batch_is_equal_up_to_rounding(runs: Any) -> None:
    x = _draw(2, TOKENS, HEADS * CHANNELS, seed=1)
    wanted, got, _ = _both(
        _block(torch.float32), x, BACKENDS[0], _settings(),
        timestep_zero_index=runs, rows=4 if runs else 2,
    )  # fmt: skip
    assert _relative(got, wanted) < 1e-6


def test_block_in_small_chunks_is_equal_up_to_rounding() -> None:
    for chunk, tokens in ((1, 70), (37, TOKENS)):
        x = _draw(1, tokens, HEADS * CHANNELS, seed=1)
        wanted, got, _ = _both(_block(torch.float32), x, BACKENDS[0], _settings(chunk=chunk))
        assert _relative(got, wanted) < 1e-6


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def denoiser(host: Any, request: pytest.FixtureRequest) -> Any:
    model = lean_models.built("ZImage", lean_models.Z_IMAGE).model.diffusion_model
    with torch.inference_mode():
        return copy.deepcopy(model).to(request.param)


def _forwards(
    denoiser: Any,
    shape: tuple[int, ...],
    text_tokens: int,
    *,
    text_batch: int | None = None,
    backend: str = BACKENDS[0],
    settings: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    from pack.nodes.host.denoiser.forward import run_forward

    dtype = denoiser.x_pad_token.dtype
    x = _draw(*shape, seed=1, dtype=dtype)
    text = _draw(text_batch or shape[0], text_tokens, lean_models.TEXT_WIDTH, seed=2, dtype=dtype)
    sigma = torch.linspace(0.7, 0.3, shape[0])
    before = x.clone(), text.clone()
    options.update(_options(backend)[0])
    wanted = denoiser(x, sigma, text, text_tokens, transformer_options=dict(options))
    got = run_forward(denoiser, x, sigma, text, dict(options), settings or _settings())
    assert torch.equal(x, before[0]) and torch.equal(text, before[1])
    assert got.shape == wanted.shape == x.shape and got.dtype == wanted.dtype
    assert wanted.isfinite().all() and wanted.std() > 0
    return wanted, got


@pytest.mark.parametrize(
    ("size", "text_tokens"),
    [((48, 48), 1), ((33, 50), 32), ((33, 50), 77), ((16, 16), 32), ((16, 16), 77), ((71, 30), 1)],
    ids=str,
)
def test_forward_has_the_hosts_bits(denoiser: Any, size: tuple[int, int], text_tokens: int) -> None:
    wanted, got = _forwards(denoiser, (1, 16, *size), text_tokens)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("size", [(1, 1), (5, 7)], ids=str)
def test_forward_of_a_few_image_tokens_is_equal_up_to_rounding(
    denoiser: Any, size: tuple[int, int]
) -> None:
    """The final layer then multiplies a few rows, for which the CPU has other kernels."""
    wanted, got = _forwards(denoiser, (1, 16, *size), 32)
    assert _relative(got, wanted) < (1e-6 if got.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("prefer", PREFERENCES)
def test_forward_of_each_preference_has_the_hosts_bits(denoiser: Any, prefer: Prefer) -> None:
    """speed and balance hold the rope table, smallest gathers it piece by piece."""
    settings = _settings(groups=0, chunk=0, prefer=prefer)
    wanted, got = _forwards(denoiser, (1, 16, 48, 48), 77, settings=settings)
    assert torch.equal(got, wanted)


def test_kitchens_that_only_make_new_tensors(denoiser: Any, monkeypatch: Any) -> None:
    """Older releases of comfy-kitchen cannot write over q and k."""
    from pack.nodes.host.denoiser import heads

    monkeypatch.setattr(heads, "IN_PLACE", False)
    wanted, got = _forwards(denoiser, (1, 16, 33, 50), 40)
    assert torch.equal(got, wanted)


def test_forward_has_the_hosts_bits_with_long_prompts_and_sub_quadratic(denoiser: Any) -> None:
    wanted, got = _forwards(denoiser, (1, 16, 40, 56), 300, backend=BACKENDS[1])
    assert torch.equal(got, wanted)


def test_forward_with_scaled_and_shifted_positions(denoiser: Any) -> None:
    rope = {"scale_x": 0.5, "scale_y": 1.7, "shift_x": 3.0, "shift_y": -1.25}
    wanted, got = _forwards(denoiser, (1, 16, 33, 50), 40, rope_options=rope)
    assert torch.equal(got, wanted)
    assert not torch.equal(_forwards(denoiser, (1, 16, 33, 50), 40)[0], wanted)


@pytest.mark.parametrize("text_batch", [1, 2])
def test_forward_of_a_batch_is_equal_up_to_rounding(denoiser: Any, text_batch: int) -> None:
    wanted, got = _forwards(denoiser, (2, 16, 33, 50), 40, text_batch=text_batch)
    assert _relative(got, wanted) < (1e-6 if got.dtype == torch.float32 else 2e-2)


@pytest.fixture(scope="module")
def loaded(host: Any, small_folder: Path) -> Any:
    return lean_models.from_loader(host, small_folder)


def _png(picture: torch.Tensor) -> bytes:
    """The file as the host's SaveImage writes it, without its text."""
    array = (255.0 * picture[0].cpu().numpy()).clip(0, 255).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="PNG", compress_level=4)
    return file.getvalue()


def _sampler(host: Any, loaded: Any, **options: Any) -> Callable[[Any], bytes]:
    settings = {"cfg": 1.0, "denoise": 1.0, "latent": {}, "negative": "", "steps": 8, **options}

    def encode(text: str) -> Any:
        return loaded.clip.encode_from_tokens_scheduled(loaded.clip.tokenize(text))

    drawn: dict[bytes, bytes] = {}  # by the latent: an equal one gives the same picture

    def run(model: Any) -> bytes:
        (latent,) = host.nodes.common_ksampler(
            model, 5, settings["steps"], settings["cfg"], "res_multistep", "simple",
            encode("a red fox in the snow"), encode(settings["negative"]),
            {"samples": torch.zeros(1, 16, 48, 40), **settings["latent"]},
            denoise=settings["denoise"],
        )  # fmt: skip
        assert latent["samples"].isfinite().all()
        key = latent["samples"].numpy().tobytes()
        if key not in drawn:
            drawn[key] = _png(loaded.vae.decode(latent["samples"]))
        return drawn[key]

    return run


def _masked() -> dict[str, torch.Tensor]:
    mask = torch.zeros(1, 1, 384, 320)
    mask[..., 100:250, 60:200] = 1.0
    return {"samples": _draw(1, 16, 48, 40, seed=6), "noise_mask": mask}


REQUESTS: dict[str, dict[str, Any]] = {
    "text to image": {},
    "prompts of differing lengths": {
        "cfg": 3.0, "steps": 2,
        "negative": "blurred, with a watermark and text over it, cut off at the edges, " * 2,
    },
    "image to image": {
        "denoise": 0.5, "steps": 2, "latent": {"samples": _draw(1, 16, 48, 40, seed=6)},
    },
    "inpainting": {"steps": 2, "latent": _masked()},
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, id=name, marks=[pytest.mark.slow] if options else [])
        for name, options in REQUESTS.items()
    ],
)
def test_the_same_picture_to_the_byte(host: Any, loaded: Any, options: dict[str, Any]) -> None:
    from pack.nodes.host.denoiser import block as lean_block

    run = _sampler(host, loaded, **options)
    wanted = run(loaded.model)
    seen: list[int] = []
    for patched in (
        lean_models.lean(loaded.model),
        lean_models.lean(loaded.model, blocks="main layers"),
        lean_models.sliced(lean_models.lean(loaded.model)),
    ):
        seen.clear()
        assert run(_watched(patched, seen)) == wanted
        assert min(seen) < 512  # queries came in chunks, the lean code ran
    assert run(loaded.model) == wanted
    assert lean_block.LeanBlock not in map(type, loaded.model.model.diffusion_model.layers)


def test_the_picture_can_differ(host: Any, loaded: Any) -> None:
    """Else the test above proves nothing."""
    run = _sampler(host, loaded, steps=2)
    assert run(_shifted(loaded.model)) != run(loaded.model)


def _watched(model: Any, seen: list[int] | None = None) -> Any:
    """A clone that notes the number of queries of each attention call."""
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    previous = options.get(lean_models.OVERRIDE)

    def watch(function: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if seen is not None and q.shape[-2] > 64:  # not the text's
            seen.append(q.shape[-2])
        if previous is not None:
            return previous(function, q, *args, **kwargs)
        return function(q, *args, **kwargs)

    watch.__dict__.update(getattr(previous, "__dict__", {}))
    options[lean_models.OVERRIDE] = watch
    return clone


def _shifted(model: Any) -> Any:
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options["rope_options"] = {"shift_x": 5.0, "scale_y": 1.5}
    return clone
