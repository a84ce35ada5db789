"""Loads through the node in the test process, and looks at what came out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

FOLDER, OTHER, SAME = "Z-Image-Turbo/", "Other/", "from the same folder"


class Loaded(NamedTuple):
    model: Any
    clip: Any
    vae: Any


def node() -> Any:
    from pack.nodes.load_model import LoadZImageTurbo

    return LoadZImageTurbo


def load(*choices: str, **options: Any) -> Loaded:
    with torch.inference_mode():  # as the host runs nodes
        return Loaded(*node().execute(*choices, **options).args)


def write_tiny_vae(host: Any) -> Path:
    """The small VAE of the host's own class: 16 latent channels, 5 MB, loaded at once."""
    from comfy.taesd.taesd import TAESD

    path = host.models_dir / "vae" / "taef1.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(TAESD(latent_channels=16).state_dict(), path)
    return path


def weights(loaded: Any) -> dict[str, torch.Tensor]:
    """The weights of a MODEL, CLIP or VAE."""
    for name in ("model", "cond_stage_model", "first_stage_model"):
        if hasattr(loaded, name):
            return getattr(loaded, name).state_dict()
    raise TypeError(type(loaded))


def is_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(one[k].dtype == two[k].dtype and torch.equal(one[k], two[k]) for k in one)


def shift_of(model: Any) -> float:
    return model.get_model_object("model_sampling").shift


def copy_folder(source: Path, target: Path) -> Path:
    """A copy to break; its files are links, so replace them (`replace_file`), never write."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, copy)
    return target


def replace_file(path: Path, data: bytes | str) -> None:
    path.unlink()
    path.write_bytes(data.encode() if isinstance(data, str) else data)


class Scratch:
    """Paths in the host's model folders; what is written there goes when `clear` is called."""

    def __init__(self, models_dir: Path) -> None:
        self._models_dir = models_dir
        self._made: list[Path] = []

    def __call__(self, kind: str, name: str) -> Path:
        self._made.append(self._models_dir / kind / name)
        self._made[-1].parent.mkdir(parents=True, exist_ok=True)
        return self._made[-1]

    def clear(self) -> None:
        for path in self._made:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
