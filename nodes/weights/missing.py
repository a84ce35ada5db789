"""One sentence on weights that are not there: which file goes where, and who publishes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .diffusers_folder import TEXT_ENCODER, TRANSFORMER, VAE

FILES_REPOSITORY = "Comfy-Org/z_image_turbo"
FOLDER_REPOSITORY = "Tongyi-MAI/Z-Image-Turbo"
# The published single file of each part.
PUBLISHED = {
    TRANSFORMER: "z_image_turbo_bf16.safetensors",
    TEXT_ENCODER: "qwen_3_4b.safetensors",
    VAE: "ae.safetensors",
}


def sentence(names: Mapping[str, str], folders: Mapping[str, str]) -> str:
    """What to do about missing files.

    Args:
        names: the missing file of each part; at least one.
        folders: the host's folder of each part's files.
    """
    if not names:
        raise ValueError("names must hold a missing file, got none")
    placed = _listed([f"{name} in models/{folders[part]}" for part, name in names.items()])
    published = [PUBLISHED[part] for part in names]
    where = f"from {FILES_REPOSITORY} on Hugging Face"
    if published == list(names.values()):
        them = "it" if len(names) == 1 else "them"
        todo = f"get {them} {where} (an example workflow offers the download)"
    else:  # nobody knows where the user's own file is from
        todo = f"choose what is there, or get {_listed(published)} {where}"
    if TRANSFORMER in names:
        todo += f", or the folder {FOLDER_REPOSITORY} for models/diffusers"
    return f"Missing: {placed}; {todo}, then press R"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
