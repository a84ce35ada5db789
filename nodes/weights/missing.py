"""One sentence on weights that are not there: which file goes where, and who publishes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from .diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE

FILES_REPOSITORY = "Comfy-Org/z_image_turbo"
FOLDER = "Z-Image-Turbo"
FOLDER_REPOSITORY = f"Tongyi-MAI/{FOLDER}"
# The published single file of each part.
PUBLISHED = {
    TRANSFORMER: "z_image_turbo_bf16.safetensors",
    TEXT_ENCODER: "qwen_3_4b.safetensors",
    VAE: "ae.safetensors",
}


def sentence(
    names: Mapping[str, str],
    folders: Mapping[str, str],
    there: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """What to do about missing files.

    Args:
        names: the missing file of each part, or folder, which ends with a slash; at least one.
        folders: the host's folder of each part's files.
        there: the files and folders that could be chosen for each part instead.
    """
    if not names:
        raise ValueError("names must hold a missing file, got none")
    places = {part: "diffusers" if n.endswith("/") else folders[part] for part, n in names.items()}
    placed = _listed([f"{name} in models/{places[part]}" for part, name in names.items()])
    published = [PUBLISHED[part] for part in names]
    are_published = published == list(names.values())
    them = "it" if len(names) == 1 else "them"
    files = them if are_published else _listed(published)
    get = f"get {files} from {FILES_REPOSITORY} on Hugging Face"
    alike = _alike(names, there)
    if TRANSFORMER in names and not any(_last(name) == FOLDER for name in alike):
        get += f", or the folder {FOLDER_REPOSITORY} for models/diffusers"
    if alike:
        get = f"choose {_listed(alike)}, or {get}"
    elif all(there.get(part) for part in names):
        get = f"choose what is there, or {get}"
    elif not are_published:  # nobody knows where the user's own file is from
        get = f"put {them} there, or {get}"
    return f"Missing: {placed}; {get}, then press R"


def _alike(names: Mapping[str, str], there: Mapping[str, Sequence[str]]) -> list[str]:
    """What is there with the name that is missing, in another folder; and the published folder."""
    known = {FOLDER, *map(_last, names.values())}
    return list(dict.fromkeys(n for p in names for n in there.get(p, ()) if _last(n) in known))


def _last(name: str) -> str:
    """The last part of a path, of either system."""
    return name.rstrip("/").replace("\\", "/").rpartition("/")[2]


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
