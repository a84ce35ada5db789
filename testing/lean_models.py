"""Small models and whole samplings for the tests of Apply Gradient Checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from . import attention_models
from .loading import FOLDER, SAME, load, write_tiny_vae

CHUNK = 256
PIECES = {"chunk_tokens": CHUNK, "head_groups": 2}
TEXT_WIDTH = 64
OVERRIDE = "optimized_attention_override"
# What the host's detection says of Z-Image, narrowed.
Z_IMAGE = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 384,
    "cap_feat_dim": TEXT_WIDTH,
    "n_layers": 2,
    "n_heads": 3,
    "n_kv_heads": 3,
    "qk_norm": True,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
# Of Lumina 2: grouped heads, modulation through SiLU, no padding.
LUMINA_2 = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 192,
    "cap_feat_dim": TEXT_WIDTH,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "qk_norm": True,
    "axes_dims": [8, 12, 12],
    "axes_lens": [300, 512, 512],
    "rope_theta": 10000.0,
    "ffn_dim_multiplier": 4.0,
}


class Run(NamedTuple):
    """What came out, and the query lengths that the attention saw, without repeats."""

    latent: torch.Tensor
    queries: set[int]
    heads: set[int]


def from_loader(host: Any, small_folder: Path, **options: Any) -> Any:
    """What our loader node gives, with a VAE that loads at once."""
    assert f"{small_folder.name}/" == FOLDER
    loaded = load(FOLDER, SAME, write_tiny_vae(host).name, **options)
    generator = torch.Generator().manual_seed(0)  # the host's own layers start as any memory
    with torch.inference_mode():
        for parameter in loaded.vae.first_stage_model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return loaded


def built(family: str, config: dict[str, Any], *, seed: int = 0) -> Any:
    """A ModelPatcher of the host's own class with seeded weights; not from a file."""
    import comfy.supported_models

    config = dict(config)
    model_config = getattr(comfy.supported_models, family)(config)
    return attention_models._built(model_config, config, seed)


def lean(model: Any, **options: Any) -> Any:
    """The model behind our node, in pieces so small that the test's pictures have several."""
    from pack.nodes.gradient_checkpoint import ApplyGradientCheckpoint

    return ApplyGradientCheckpoint.execute(model, **{**PIECES, **options}).args[0]


@contextmanager
def without_kernels() -> Iterator[None]:
    """On fake tensors: as with a CUDA for which the host switches comfy-kitchen's kernels off.

    Its forms in place refuse fake tensors, which all begin at address 0: new tensors are copied.
    """
    from pack.nodes.host.denoiser import heads

    with mock.patch.multiple(heads, IN_PLACE=False, _has_kernel=lambda *_: False):
        yield


def sliced(model: Any, mode: str = "max") -> Any:
    from pack.nodes.attention_slice import AttentionSlice

    return AttentionSlice.execute(model, mode, 0).args[0]


def prompt(tokens: int = 7, *, seed: int = 0, batch: int = 1, **more: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(batch, tokens, TEXT_WIDTH, generator=generator), more]]


def latent(side: int = 48, *, seed: int = 1, batch: int = 1) -> torch.Tensor:
    """48 x 48: 576 image tokens and 32 of text, so two chunks of 256 and more."""
    return torch.randn(batch, 16, side, side, generator=torch.Generator().manual_seed(seed))


def prepare(model: Any, noise: torch.Tensor, **more: Any) -> None:
    """What a sampler does before its first step; `more` goes to the prompt."""
    import comfy.model_patcher
    import comfy.sampler_helpers

    options = comfy.model_patcher.create_model_options_clone(model.model_options)
    conds = {"positive": comfy.sampler_helpers.convert_cond(prompt(**more))}
    comfy.sampler_helpers.prepare_model_patcher(model, conds, options)
    comfy.sampler_helpers.prepare_sampling(model, noise.shape, conds, model_options=options)


def sample(
    model: Any,
    *,
    cfg: float = 1.0,
    steps: int = 1,
    sampler: str = "euler",
    noise: torch.Tensor | None = None,
    positive: list[Any] | None = None,
    negative: list[Any] | None = None,
    **options: Any,
) -> Run:
    """Samples as KSampler does and records what the attention was asked."""
    import comfy.sample

    noise = latent() if noise is None else noise
    queries, heads = set(), set()
    watched = model.clone()
    transformer_options = watched.model_options.setdefault("transformer_options", {})
    previous = transformer_options.get(OVERRIDE)

    def watch(function: Callable[..., Any], q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            queries.add(q.shape[-2])
            heads.add(q.shape[1])
        if previous is not None:
            return previous(function, q, *args, **kwargs)
        return function(q, *args, **kwargs)

    # Ours asks and tells Attention Slice by the override's own marks.
    watch.__dict__.update(getattr(previous, "__dict__", {}))
    transformer_options[OVERRIDE] = watch
    with torch.inference_mode():
        out = comfy.sample.sample(
            watched,
            noise,
            steps,
            cfg,
            sampler,
            "simple",
            positive or prompt(),
            negative or prompt(seed=5),
            options.pop("latent_image", torch.zeros_like(noise)),
            seed=1,
            disable_pbar=True,
            **options,
        )
    assert out.isfinite().all() and out.std() > 0
    return Run(out, queries, heads)


def assert_same(stock: Any, patched: Any, *, rounding: bool = False, **options: Any) -> Run:
    """Samples both and compares; returns the patched run, which must have been cut."""
    wanted, got = sample(stock, **options), sample(patched, **options)
    if rounding:
        error = (got.latent - wanted.latent).norm() / wanted.latent.norm()
        assert error < 1e-5, error
    else:
        assert torch.equal(got.latent, wanted.latent)
    assert min(got.queries | {10**9}) < max(wanted.queries), (got.queries, wanted.queries)
    return got


def lora_file(layers: Iterable[tuple[str, int, int]], *, seed: int = 3) -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 for modules of the host's transformer: (name, inputs, outputs)."""
    generator = torch.Generator().manual_seed(seed)
    file = {}
    for name, inputs, outputs in layers:
        file[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
        up = 0.05 * torch.randn(outputs, 4, generator=generator)
        file[f"diffusion_model.{name}.lora_B.weight"] = up
    return file


def block_lora(model: Any) -> dict[str, torch.Tensor]:
    """A LoRA on the linear layers of every block."""
    denoiser = model.get_model_object("diffusion_model")
    named = dict(denoiser.named_modules())
    chosen = [
        f"{stack}.{i}.{layer}"
        for stack in ("noise_refiner", "context_refiner", "layers")
        for i in range(len(getattr(denoiser, stack)))
        for layer in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2")
    ]
    return lora_file((n, named[n].in_features, named[n].out_features) for n in chosen)


def _is_quantised(name: str) -> bool:
    """True for the linear layers of Z-Image's blocks."""
    is_linear = any(part in name for part in ("qkv", "attention.out", "feed_forward"))
    return is_linear and name.startswith(("layers", "noise_refiner", "context_refiner"))


def quantised(
    weights: dict[str, torch.Tensor],
    algorithm: str,
    device: torch.device | str = "cpu",
    *,
    is_chosen: Callable[[str], bool] = _is_quantised,
) -> dict[str, torch.Tensor]:
    """The weights with the blocks' linear layers in the host's own quantised format, on the CPU.

    Args:
        weights: of the transformer, by their names in the single file.
        algorithm: one of the host's QUANT_ALGOS.
        device: quantises them.
        is_chosen: whether a weight is quantised, by its name.
    """
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    mark = torch.tensor(list(json.dumps({"format": algorithm}).encode()), dtype=torch.uint8)
    result = {}
    for name, tensor in weights.items():
        if is_chosen(name):
            packed = QuantizedTensor.from_float(tensor.to(device), layout, scale="recalculate")
            result |= {part: value.cpu() for part, value in packed.state_dict(name).items()}
            result[f"{name.removesuffix('.weight')}.comfy_quant"] = mark
        else:
            result[name] = tensor
    return result


def count_fetches(monkeypatch: Any, model: Any) -> Counter[Any]:
    """Has each weight of the model streamed; counts fetches by layer from now on."""
    import comfy.ops

    for layer in model.model.diffusion_model.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
    fetch, fetched = comfy.ops.cast_bias_weight, Counter()

    def counted(layer: Any, *args: Any, **more: Any) -> Any:
        fetched[layer] += 1
        return fetch(layer, *args, **more)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", counted)
    return fetched


def offloaded(model: Any) -> Any:
    """A clone whose weights leave the device after loading, as on a card that is too small."""
    from comfy.patcher_extension import CallbacksMP

    clone = model.clone()

    def unload(patcher: Any) -> None:
        patcher.partially_unload(torch.device("cpu"), 10**12)
        assert patcher.model.model_lowvram

    clone.add_callback(CallbacksMP.ON_PRE_RUN, unload)
    return clone


def stopping(model: Any, stop: Callable[[], None], *, at: int) -> Any:
    """A clone that calls `stop` in the attention call number `at`, counted over all samplings."""
    clone = model.clone()
    calls = 0

    def override(function: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            stop()
        return function(*args, **kwargs)

    clone.model_options["transformer_options"][OVERRIDE] = override
    return clone


def fail(*_: Any, **__: Any) -> None:
    raise RuntimeError("in the middle")
