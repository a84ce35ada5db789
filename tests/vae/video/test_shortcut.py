"""A path around layers of a video VAE, over strips."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pack.nodes.vae import reference
from pack.nodes.vae.video.sizes import Kind, shortcut_around
from pack.testing.video_parts import WIDTH, Made, in_strips

# The layers of each group, the first of which changes the channels.
CHAINS: dict[str, tuple[list[Kind], int, int]] = {
    "up, more frames": (["block", "time_up", "up"], 8, 4),
    "up": (["block", "up"], 8, 4),
    "up, as wide": (["block", "time_up", "up"], 6, 6),
    "down, fewer frames": (["block", "down", "time_down"], 6, 12),
    "down": (["block", "down"], 6, 6),
    "same": (["block", "conv"], 6, 6),
}


def _chain(name: str, dtype: torch.dtype) -> list[Made]:
    kinds, given, made = CHAINS[name]
    return [Made(kind, dtype, made if number else given, made) for number, kind in enumerate(kinds)]


def _shortcut(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    _, _, made = CHAINS[name]
    frames = 2 if "frames" in name or "wide" in name else 1
    if "up" in name:
        return lambda x: reference.repeated(x, made, frames)
    return lambda x: reference.averaged(x, frames) if "down" in name else x.double()


def _run(name: str, chain: list[Made], x: torch.Tensor, rows: int) -> torch.Tensor:
    short = shortcut_around([one.link for one in chain], 0, len(chain))
    return in_strips(chain, x, rows, is_decoder="down" not in name, shortcuts=(short,))


@pytest.mark.parametrize("name", CHAINS)
@torch.inference_mode()
def test_a_shortcut_is_added_to_what_its_layers_make(name: str) -> None:
    chain, shortcut = _chain(name, torch.float32), _shortcut(name)
    for frames in (1, 5):
        # The second has a last strip of one row.
        for height, rows in ((8, 8), (10, 3), (6, 100), (6, 1), (12, 5)):
            x = torch.randn(1, chain[0].given, frames, height, WIDTH + 1)
            wanted = x
            for one in chain:
                wanted = one.oracle(wanted)
            wanted = wanted + shortcut(x)
            result = _run(name, chain, x, rows)
            assert result.shape == wanted.shape
            assert (result - wanted).norm() < 2e-6 * wanted.norm()


@pytest.mark.parametrize("name", CHAINS)
@torch.inference_mode()
def test_strips_are_bit_for_bit_those_of_one_strip(name: str) -> None:
    chain = _chain(name, torch.bfloat16)
    x = torch.randn(1, chain[0].given, 5, 20, 8).bfloat16()
    before, whole = x.clone(), _run(name, chain, x, 100)
    for rows in (1, 2, 5, 19):
        assert torch.equal(_run(name, chain, x, rows), whole)
    assert torch.equal(x, before)


@torch.inference_mode()
def test_two_shortcuts_in_turn_and_one_around_both() -> None:
    chain = [*_chain("down, fewer frames", torch.float32)[1:], *_chain("same", torch.float32)]
    chain = [Made(one.kind, one.dtype, 6, 6) for one in chain]
    links = [one.link for one in chain]
    shortcuts = tuple(shortcut_around(links, *ends) for ends in ((2, 3), (3, 4), (2, 4)))
    x = torch.randn(1, 6, 5, 8, 6)
    made = in_strips(chain, x, 3, is_decoder=False, shortcuts=shortcuts)
    given = chain[1].oracle(chain[0].oracle(x))
    first = chain[2].oracle(given) + given
    wanted = chain[3].oracle(first) + first + given
    assert (made - wanted).norm() < 2e-6 * wanted.norm()
