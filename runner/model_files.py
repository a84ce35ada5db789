"""Finds Z-Image-Turbo's parts in a folder of models and shows them to the host, copying nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .environment import SetupError
from .folder_links import link_folder

SAME_FOLDER = "from the same folder"
# The parts, each with the host's folders for it and a tensor name that only such a file has.
DIFFUSION_MODEL = ("diffusion_models", "unet")
TEXT_ENCODER = ("text_encoders", "clip")
VAE = ("vae",)
_SIGN = {
    DIFFUSION_MODEL: "cap_embedder.1.weight",
    TEXT_ENCODER: "layers.0.self_attn.q_norm.weight",
    VAE: "decoder.conv_in.weight",
}
_WORDS = {
    DIFFUSION_MODEL: ("z_image_turbo", "z-image-turbo", "turbo", "z_image", "z-image"),
    TEXT_ENCODER: ("qwen_3_4b", "qwen3_4b", "qwen3-4b", "qwen"),
    VAE: ("ae.safetensors", "flux"),
}
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format allows no more


class Models(NamedTuple):
    """What the loader node's first three inputs are to be, and the file that makes the host see it.

    diffusion_model, text_encoder, vae: the values of the inputs.
    paths_file: a file in the host's extra_model_paths format.
    """

    diffusion_model: str
    text_encoder: str
    vae: str
    paths_file: Path


def offer_models(folder: Path, base_dir: Path) -> Models:
    """Finds the parts in `folder`: a ComfyUI models folder, loose files, or a diffusers folder.

    Raises:
        SetupError: a part is missing; the message says which.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise SetupError(f"--models: {folder} is not a folder")
    if is_diffusers_folder(folder):
        link_folder(folder, base_dir / "linked" / "diffusers" / folder.name)
        paths = {"diffusers": str(base_dir / "linked" / "diffusers")}
        return _write(base_dir, paths, f"{folder.name}/", SAME_FOLDER, SAME_FOLDER)

    for root in (folder, folder / "models"):
        kinds = {kind for part in _SIGN for kind in part if (root / kind).is_dir()}
        if kinds or (root / "diffusers").is_dir():
            places = {part: [root / kind for kind in part] for part in _SIGN}
            inner = sorted(f for f in (root / "diffusers").glob("*") if is_diffusers_folder(f))
            paths = {k: str(root / k) for k in sorted({*kinds, "diffusers", "loras", "embeddings"})}
            break
    else:
        places, inner = {part: [folder] for part in _SIGN}, []
        paths = {part[0]: str(folder) for part in _SIGN}

    found = {part: _find(part, places[part]) for part in _SIGN}
    model, encoder, vae = (found[part] for part in (DIFFUSION_MODEL, TEXT_ENCODER, VAE))
    if inner:
        other = f"{inner[0].name}/"
        same = SAME_FOLDER if model is None else other
        model, encoder, vae = model or other, encoder or same, vae or same
    names = ("a Z-Image transformer", "its text encoder (Qwen3-4B)", "its VAE (ae.safetensors)")
    missing = [name for name, value in zip(names, (model, encoder, vae), strict=True) if not value]
    if missing:
        raise SetupError(f"--models: {folder} holds no safetensors file of {' or '.join(missing)}")
    return _write(base_dir, paths, model, encoder, vae)


def is_diffusers_folder(folder: Path) -> bool:
    return (folder / "transformer" / "config.json").is_file()


def _write(base_dir: Path, paths: dict[str, str], model: str, encoder: str, vae: str) -> Models:
    paths_file = base_dir / "model_paths.yaml"
    base_dir.mkdir(parents=True, exist_ok=True)
    paths_file.write_text(json.dumps({"z_image": paths}), encoding="utf-8")  # JSON is YAML
    return Models(model, encoder, vae, paths_file)


def _find(part: tuple[str, ...], places: Iterable[Path]) -> str | None:
    """The name, as the host lists it, of the likeliest file of a part."""
    names = []
    for place in places:
        for directory, _, files in os.walk(place, followlinks=True):
            for file in files:
                path = Path(directory) / file
                if file.endswith(".safetensors") and _has_tensor(path, _SIGN[part]):
                    names.append(str(path.relative_to(place)))
    words = _WORDS[part]

    def rank(name: str) -> tuple[int, str]:
        return next((i for i, word in enumerate(words) if word in name.lower()), len(words)), name

    return min(names, key=rank, default=None)


def _has_tensor(path: Path, name_end: str) -> bool:
    """Whether a safetensors file names such a tensor; False for a file that is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            names = json.loads(file.read(length)) if 0 < length < _MAX_HEADER_BYTES else {}
    except (OSError, ValueError):
        return False
    return any(name.endswith(name_end) for name in names)
