"""What is English in a Chinese text: words that are no name, unit, setting or piece of code."""

from __future__ import annotations

import re

_WORD = re.compile(r"[A-Za-z][\w.+/'-]*")
_QUOTED = re.compile(r"(?<!\w)'\w+'")  # a value that was given
# Names, units, settings and the field's words that Chinese users write as they are.
_NAMES = {
    *("ComfyUI", "torch", "comfy-aimdo", "transformer", "token", "ControlNet", "MODEL", "VAE"),
    *("VRAM", "GPU", "CPU", "RSS", "JSON", "PCIe", "Ctrl+Z", "Z-Image", "Low"),
    *("GiB", "MiB", "KiB", "B", "GB/s", "s", "fp8", "bf16"),
    *("prefer", "speed", "balance", "smallest", "head_groups", "budget_gib", "width_px", "batch"),
    *("cpu", "cuda", "mps", "None"),
}


def english(text: str) -> list[str]:
    """The English words of a text, in order."""
    return [
        word
        for word in _WORD.findall(_QUOTED.sub("", text))
        if word not in _NAMES and not _is_code(word)
    ]


def _is_code(word: str) -> bool:
    """Whether it is the name of a class, a file, a block or an operation: KSampler, layers.12."""
    inner = word.rstrip(".'-")[1:]
    return bool(re.search(r"[A-Z\d_]", inner) or re.search(r"\w\.\w", word))
