"""The figures of the documents that are no measurements: document, figure, what it is.

A page and its Chinese one share an entry.
"""

from __future__ import annotations

from pack.nodes.attention.budget import BUDGET_BYTES
from pack.nodes.denoiser.cost import LAUNCH_S, WAITING
from pack.nodes.denoiser.cuts import CHUNK_MULTIPLE, LONG_CHUNK
from pack.nodes.denoiser.plan import TILE_COLUMNS, TILE_ROWS
from pack.nodes.denoiser.products import BALANCE_COPY, ELEMENT_BITS, LEAST_COPY, SPEED_COPY
from pack.nodes.fit.stages import published_models
from pack.nodes.fit.text_encoder import QWEN3_4B
from pack.nodes.units import GIB, MIB
from pack.nodes.vae.need import SPARE_BYTES
from pack.nodes.weights.missing import PUBLISHED, TEXT_ENCODER, TRANSFORMER, VAE

_MODELS = published_models()
# Sizes of the published files; the VAE's is in float32.
FILE_SIZES = {
    PUBLISHED[TRANSFORMER]: f"{_MODELS.denoiser_weight_bytes / GIB:.1f} GiB",
    PUBLISHED[TEXT_ENCODER]: f"{_MODELS.text_weight_bytes / GIB:.1f} GiB",
    PUBLISHED[VAE]: f"{2 * _MODELS.vae_weight_bytes / GIB:.1f} GiB",
}
_FILES = {size: f"size of {name}" for name, size in FILE_SIZES.items()}
_EXACT = {f"{LONG_CHUNK} tokens": "chunks that are bit-exact on the CPU, LONG_CHUNK"}
_PICTURES = {"1024x1024": "a picture", "2048x2048": "a picture"}


def _copied(elements: int) -> str:
    return f"{elements * ELEMENT_BITS // 8 // MIB} MiB"


SETTINGS: dict[str, dict[str, str]] = {
    "README": {
        **_FILES,
        **_EXACT,
        **_PICTURES,
        "4096x4096": "a picture",
        "4096 px": "the last size in fit_sizes.gif",
        "8 GiB": "free memory, a budget",
        "8 GB": "a card",
        "20 GiB": "RAM to keep free",
        "12 GB": "disk space of a demo",
    },
    "docs/developing": {
        "12 GB": "disk space of a demo",
        "6 GB": "disk space of the environment",
        "512x768": "an example",
    },
    "docs/how-it-works": {
        **_EXACT,
        f"{CHUNK_MULTIPLE} tokens": "CHUNK_MULTIPLE",
        "1024x1024": "a picture",
        f"{TILE_ROWS}x{TILE_COLUMNS}": "tiles of a product, plan.py",
        "2x2": "pixels that become channels",
        "1.6x": "multiprocessors that heads should fill",
        _copied(SPEED_COPY): "SPEED_COPY",
        _copied(BALANCE_COPY): "BALANCE_COPY",
        _copied(LEAST_COPY): "LEAST_COPY",
        "1 GiB": "a budget",
        f"{100 * WAITING:.0f} %": "WAITING of the cost model",
        "50 GB/s": "a PCIe link",
        f"{1e6 * LAUNCH_S:.0f} us": "LAUNCH_S of the cost model",
    },
    "docs/measurements": {
        **_PICTURES,
        "256x256": "a picture",
        "512x512": "a picture",
        "256 px": "a tile",
        "512 px": "a tile",
        "4096 tokens": "the longest prompt",
        "8 GiB": "a budget",
        "24 GiB": "a budget",
        "80 %": "of a PCIe link's rate, in the cost model",
        "25 GiB": "disk space of the card's benchmark",
        "25 min": "a call of the card's benchmark",
        "3 min": "its rehearsal",
    },
    "docs/troubleshooting": {"20 GiB": "RAM to keep free"},
    "js/docs/ZImageAttentionSlice": {f"{BUDGET_BYTES // MIB} MiB": "BUDGET_BYTES"},
    "js/docs/ZImageFitToVRAM": {
        "512 tokens": "a prompt's length that is assumed",
        "0.2 s": "an example of the headline",
        "5 %": "what is apart",
        "0.7x": "workspace of the sampling",
        "0.5x": "workspace of VAE and text encoder",
        f"{SPARE_BYTES // MIB} MiB": "SPARE_BYTES",
        f"{2 * QWEN3_4B.table / GIB:.2f} GiB": "the embedding table",
    },
    "js/docs/ZImageGradientCheckpoint": {**_EXACT, **_PICTURES, "16x16": "pixels of a token"},
    "js/docs/ZImageLeanVAE": {
        **_PICTURES,
        "2 GiB": "RAM that is left free",
        "8 %": "rows that are computed twice",
    },
    "js/docs/ZImageTurboLoader": _FILES,
    "js/docs/ZImageVRAMProbe": {"15 %": "geometry.js"},
}


def page_of(name: str) -> str:
    """The key of SETTINGS for a document of either language."""
    return name.removesuffix(".md").removesuffix(".zh").removesuffix("/zh")


def settings_of(name: str) -> dict[str, str]:
    return SETTINGS.get(page_of(name), {})
