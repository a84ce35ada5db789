"""The legs of the campaign in their order, and what a rehearsal cannot try. Standard library."""

from __future__ import annotations

from collections.abc import Sequence

from .job import Leg

PARTS = ("sanity", "denoiser", "vae", "budget", "predicted", "probe", "tutorial", "training")
CARDS_GIB = (1.5, 4.0, 6.0, 8.0, 12.0)
_DYNAMIC = "dynamic VRAM exists on a card alone"
_AGAIN = "on the CPU it would repeat the leg before it"
# Needs a card; a rehearsal cannot test it.
NOT_REHEARSED = (
    "kernels on the card, and TF32 in them",
    "torch's allocated and reserved bytes on the card, and times by CUDA events",
    "kernels launched per step (torch's profiler)",
    "the card's memory as the driver sees it (NVML)",
    "ballast that imitates a smaller card",
    "dynamic VRAM, cudaMallocAsync and weights streamed from RAM",
    "writing 20 GiB of random weights",
)


def legs(parts: Sequence[str] = PARTS, cards_gib: Sequence[float] = CARDS_GIB) -> list[Leg]:
    """The legs of these parts, the most valuable first.

    Args:
        parts: names out of `PARTS`.
        cards_gib: cards to imitate; the card as it is comes before them.
    """
    native = {"allocator": "native", "needs_card": "the native allocator exists on a card alone"}
    every = [
        Leg("sanity", "loading by estimate", 30, 180, "estimate"),
        Leg("sanity", "dynamic VRAM", 15, 120, needs_card=_DYNAMIC),
        Leg("sanity", "native allocator", 15, 120, "estimate", **native),
        Leg("denoiser", "dynamic VRAM", 270, 540),
        Leg("denoiser", "loading by estimate", 60, 240, "estimate", needs_card=_AGAIN),
        Leg("vae", "all", 60, 240),
        Leg("budget", "the card as it is", 100, 360),
        *(
            Leg("budget", f"{gib:g} GiB", 110, 360, card_gib=gib, needs_card="ballast needs a card")
            for gib in sorted(cards_gib, reverse=True)
        ),
        Leg("predicted", "all", 35, 120, reads=("denoiser", "vae")),
        Leg("probe", "dynamic VRAM", 45, 180),
        Leg("probe", "loading by estimate", 30, 180, "estimate", needs_card=_AGAIN),
        Leg("tutorial", "all", 60, 240, "estimate"),
        Leg("training", "all", 120, 300),
    ]
    return [leg for leg in every if leg.part in parts]
