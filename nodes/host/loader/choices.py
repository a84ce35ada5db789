"""What the loader node offers, and the checked weights behind what was chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths

from ...weights import diffusers_folder, family
from ...weights.component import Component, open_file
from ...weights.diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE
from ...weights.header import WeightsError
from ...weights.missing import PUBLISHED, sentence
from ...weights.text_encoder import size_name

SAME_FOLDER = "from the same folder"
NO_FILE = "no file yet"  # stands in an empty list, for a node that the user has just added
DEFAULT_SHIFT = 3.0
# Of each part of a diffusers folder: the node's input, and the host's folder of single files.
INPUTS = {TRANSFORMER: "diffusion_model", TEXT_ENCODER: "text_encoder", VAE: "vae"}
_KINDS = {TRANSFORMER: "diffusion_models", TEXT_ENCODER: "text_encoders", VAE: "vae"}


@dataclass(frozen=True)
class Sources:
    """Checked weights that belong together; no tensor has been read.

    z_image: what the transformer's tensors say about it.
    text_config: sizes of the text encoder, by the names of transformers' Qwen3Config.
    shift: the timestep shift to sample with.
    """

    transformer: Component
    text_encoder: Component
    vae: Component
    z_image: family.ZImage
    text_config: dict[str, Any]
    shift: float

    def summary(self, dtype_name: str) -> str:
        """Model and text encoder in one line, for the node; dtype_name is the model's."""
        config = self.text_config
        return (
            f"{self.z_image.name}, {_layers(self.z_image.layers)}, {dtype_name} · "
            f"{size_name(config['hidden_size'])}, {_layers(config['num_hidden_layers'])}"
        )


def options(part: str) -> list[str]:
    """The files and folders to choose from for a part; may be none."""
    # Not Path.is_dir(): before Python 3.14 it raises for a folder that may not be entered.
    with_part = [name for name, path in folders().items() if os.path.isdir(path / part)]
    return [*folder_paths.get_filename_list(_KINDS[part]), *sorted(with_part)]


def by_part(
    diffusion_model: str | None, text_encoder: str | None, vae: str | None
) -> dict[str, str]:
    """The choice for each part, with "from the same folder" replaced by that folder.

    Raises:
        FileNotFoundError: a chosen file or folder is missing; the sentence names all that are.
        WeightsError: there is no such folder, as diffusion_model is a file.
    """
    given = zip(_KINDS, (diffusion_model, text_encoder, vae), strict=True)
    choices = {part: choice or "" for part, choice in given}
    for part, choice in choices.items():
        if _is_open(part, choice) and options(part):  # the files came after the node
            raise FileNotFoundError(
                f"{INPUTS[part]} is {choice!r}, but there are files now: press R, then choose one"
            )
    if absent := _absent(choices):
        raise FileNotFoundError(_missing(absent))
    model = choices[TRANSFORMER]
    for part, choice in choices.items():
        if choice == SAME_FOLDER and not model.endswith("/"):
            raise WeightsError(
                f"{part} is '{SAME_FOLDER}', but diffusion_model is the file {model}: "
                f"choose a file for {part}, or a folder for diffusion_model"
            )
    return {part: model if c == SAME_FOLDER else c for part, c in choices.items()}


def files_of(choices: dict[str, str]) -> list[Path]:
    """The files that decide what these choices load."""
    known = folders()
    paths: list[Path] = []
    for part, choice in choices.items():
        if choice in known:
            paths += diffusers_folder.files_of(known[choice], part)
        elif not choice.endswith("/"):
            paths.append(_file(part, choice))
    return paths


def open_all(choices: dict[str, str], shift: float) -> Sources:
    """Opens every part and checks that they belong together.

    Args:
        choices: from `by_part`.
        shift: 0 takes that of the transformer's folder, or the default.

    Raises:
        WeightsError: a part is missing or broken, or is not the one that Z-Image needs.
        FileNotFoundError: the host has no such file or folder.
    """
    known = folders()
    opened = {part: open_part(part, choice, known) for part, choice in choices.items()}
    transformer, text_encoder, vae = (opened[part] for part in (TRANSFORMER, TEXT_ENCODER, VAE))
    folder = known.get(choices[TRANSFORMER])
    z_image = family.z_image(transformer, diffusers_folder.pipeline_class(folder) if folder else "")
    config = family.check_text_encoder(text_encoder, text_width=z_image.text_width)
    family.check_vae(vae, latent_channels=z_image.latent_channels)
    if not shift:
        shift = (diffusers_folder.scheduler_shift(folder) if folder else None) or DEFAULT_SHIFT
    return Sources(transformer, text_encoder, vae, z_image, config, shift)


def folders() -> dict[str, Path]:
    """The diffusers folders that the host has, by the name to choose."""
    roots = [Path(root) for root in folder_paths.get_folder_paths("diffusers")]
    return diffusers_folder.find_folders(roots)


def open_part(part: str, choice: str, known: dict[str, Path]) -> Component:
    """Opens what was chosen for a part; known: from `folders`. Raises as `open_all`."""
    if choice in known:
        return diffusers_folder.open_part(known[choice], choice, part)
    return open_file(_file(part, choice), choice)


def _absent(choices: Mapping[str, str]) -> dict[str, str]:
    """What to put into place for each part that is not there."""
    absent: dict[str, str] = {}
    for part, choice in choices.items():
        is_open = _is_open(part, choice)
        if choice == SAME_FOLDER and not is_open and absent.get(TRANSFORMER, "/").endswith("/"):
            continue  # the part comes with that folder, or the transformer is a file
        name = PUBLISHED[part] if is_open or choice == SAME_FOLDER else choice
        # The folders are only looked for where one is named.
        if not (name in folders() if name.endswith("/") else _path(part, name)):
            absent[part] = name
    return absent


def _is_open(part: str, choice: str) -> bool:
    """Whether nothing has been chosen, as there was nothing to choose from."""
    return not choice or choice == NO_FILE or (part == TRANSFORMER and choice == SAME_FOLDER)


def _path(part: str, name: str) -> str | None:
    return folder_paths.get_full_path(_KINDS[part], name)


def _file(part: str, name: str) -> Path:
    path = _path(part, name)
    if path is None:
        raise FileNotFoundError(_missing({part: name}))
    return Path(path)


def _missing(names: Mapping[str, str]) -> str:
    return sentence(names, _KINDS, {part: options(part) for part in names})


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"
