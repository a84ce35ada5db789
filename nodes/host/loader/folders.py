"""Where the host keeps model files."""

from __future__ import annotations

from pathlib import Path

import folder_paths


def file_names(kind: str) -> list[str]:
    """Names of the files in the host's folders of that kind, such as "diffusion_models"."""
    return folder_paths.get_filename_list(kind)


def file_path(kind: str, name: str) -> Path:
    """The path of one of those files.

    Raises:
        FileNotFoundError: the host has no such file.
    """
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        raise FileNotFoundError(
            f"{name} is not in the {kind} folder: refresh the page (R) and choose a file"
        )
    return Path(path)


def search_paths(kind: str) -> list[Path]:
    """The host's folders of that kind."""
    return [Path(path) for path in folder_paths.get_folder_paths(kind)]
