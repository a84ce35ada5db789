"""How a U-Net's maps are cut follows what its transformer blocks hold."""

from __future__ import annotations

import pytest
from pack.nodes.denoiser.plan import DenoiserChoice
from pack.nodes.denoiser.sizes import TransformerSizes
from pack.nodes.denoiser.unet_cuts import MOST_STRIPS, map_strips

SDXL = TransformerSizes(
    640, 10, 10, 64, 2560, layers=70, refiner_layers=0, patch=2, channels=4, pad_multiple=1,
    stock_elements=18 * 640,
)  # fmt: skip


def test_the_largest_maps_of_sdxl_are_cut() -> None:
    def strips(made: int, out: int, scale: float) -> int:
        return map_strips(SDXL, DenoiserChoice(), made, out, scale)

    assert strips(960, 320, 1) > 1 and strips(640, 640, 1) > 1  # the last level's first maps
    assert strips(1920, 640, 2) == strips(2560, 1280, 4) == strips(640, 320, 1) == 1


@pytest.mark.parametrize("made", [320, 960, 2560])
@pytest.mark.parametrize("scale", [0.5, 1, 4])
def test_less_memory_is_never_fewer_strips(made: int, scale: float) -> None:
    choices = [DenoiserChoice(prefer) for prefer in ("speed", "balance", "smallest")]
    choices.append(DenoiserChoice(chunk_tokens=256))
    counts = [map_strips(SDXL, choice, made, 320, scale) for choice in choices]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == MOST_STRIPS
