"""Calls and samplings of the small models of other families; see family_models.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from . import lean_models
from .family_models import SMALL, WAN

PICTURE = 9  # tokens of a picture beside a text


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def latent_shape(name: str, tokens: int, frames: int = 0, batch: int = 1) -> tuple[int, ...]:
    """Of a picture with that many tokens a side."""
    small = SMALL[name]
    between = () if small.frames is None else (frames or small.frames,)
    return batch, small.channels, *between, tokens * small.cell, tokens * small.cell


def forward(
    model: Any,
    name: str,
    *,
    batch: int = 1,
    tokens: int = 0,
    frames: int = 0,
    times: torch.Tensor | None = None,
    **more: Any,
) -> torch.Tensor:
    """One call of the transformer, with the model's patches in place as in sampling."""
    from .stock_forward import installed

    small = SMALL[name]
    with installed(model) as options:
        denoiser = model.model.diffusion_model
        dtype = denoiser.dtype
        batch, channels, *sides = latent_shape(name, tokens or small.sides[0], frames, batch)
        channels = getattr(denoiser, "in_dim", channels) if name in WAN else channels
        latent = drawn(batch, channels, *sides, dtype=dtype, seed=1)
        text = drawn(batch, small.text, lean_models.TEXT_WIDTH, dtype=dtype, seed=2)
        more["transformer_options"] = {**options, **more.get("transformer_options", {})}
        for key, width in small.inputs.items():
            value = drawn(batch, width, dtype=dtype, seed=3) if width else torch.full((batch,), 3.5)
            more.setdefault(key, value.to(dtype))
        if getattr(denoiser, "img_emb", None) is not None:
            more.setdefault("clip_fea", drawn(batch, PICTURE, 1280, dtype=dtype, seed=3))
        time = torch.full((batch,), 0.7) if times is None else times
        return denoiser(latent, time.to(dtype), text, **more)


def given(name: str, *, frames: int = 0, tokens: int = 0) -> dict[str, Any]:
    """Noise and prompts for `sample`, in several chunks."""
    small = SMALL[name]
    noise = drawn(*latent_shape(name, tokens or small.sides[1], frames), seed=1)
    more: dict[str, Any] = {"pooled_output": drawn(1, 32, seed=3)}
    if small.supported == "WAN21_I2V":
        picture = drawn(*noise.shape, seed=4)
        more |= {"concat_latent_image": picture, "concat_mask": picture[:, :1]}
    prompt = lean_models.prompt(**more)
    return {"noise": noise, "positive": prompt, "negative": prompt}


class Heard:
    """A lean model whose parts note the reasons for which the host's own ran."""

    def __init__(self, model: Any, **options: Any) -> None:
        from pack.nodes.host.denoiser.forwards import LayersOfCall

        self.model, self.reasons = lean_models.lean(model, **options), []
        wrappers = (w for kind in self.model.wrappers.values() for ws in kind.values() for w in ws)
        of_calls = (wrapper for wrapper in wrappers if isinstance(wrapper, LayersOfCall))
        for part in (*self.model.object_patches.values(), *of_calls):
            part._on_handover = self.reasons.append


class Kept:
    """Tensors that a hook or an override keeps, each with a copy of what it was."""

    def __init__(self) -> None:
        self.results: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, given: Iterable[torch.Tensor], result: torch.Tensor) -> None:
        self.results += [(held, held.clone()) for held in (*given, result)]

    @property
    def is_unchanged(self) -> bool:
        return bool(self.results) and all(torch.equal(now, then) for now, then in self.results)


def attention_patch(name: str, factor: float, kind: str = "attn1_patch") -> Any:
    """A patch of that kind as the host calls it; factor: of what it changes."""
    if kind == "attn1_output_patch":
        return lambda attended, options: factor * attended
    if name in WAN:
        return lambda args: factor * args["x"]
    return lambda q, k, v, **more: {"q": factor * q}
