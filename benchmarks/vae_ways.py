"""The VAEs that vae_compare runs, and the ways to decode and encode with one of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch

STOCK, PLANAR, TILED, FALLBACK = "stock", "stock, planar", "VAEDecodeTiled", "fallback"
OURS = ("speed", "balance", "smallest")
WAYS = (STOCK, PLANAR, TILED, FALLBACK, *OURS)
# In latent pixels, as the node VAEDecodeTiled and the host's fallback call the host's tiles.
TILES = {TILED: (64, 8), FALLBACK: (64, 16)}

Run = Callable[[torch.Tensor], torch.Tensor]


def tile_edges(side: int, tile: int, overlap: int) -> Iterator[int]:
    """Where the host's three passes of tiles begin and end in a side, all in latent pixels."""
    for length in (tile // 2, tile, tile * 2):
        yield from _edges_of_pass(side, length, overlap)


def _edges_of_pass(side: int, length: int, overlap: int) -> Iterator[int]:
    if length < side:
        for start in range(0, side - overlap, length - overlap):
            yield from (edge for edge in (start, start + length) if 0 < edge < side)


class Compared(ABC):
    """A VAE of the host at its own widths, with seeded random weights, float32.

    Args:
        contrast: scales the weights of the decoder's last convolution.
        side: of the picture, in pixels.
        frames: of the video.
    """

    name: ClassVar[str]

    def __init__(self, contrast: float, side: int, frames: int) -> None:
        from pack.testing.vae_models import lean

        self.side, self.frames = side, frames
        self.vae = self._made()
        for parameter in self._last_conv().parameters():
            parameter.mul_(contrast)
        self.lean = {prefer: lean(self.vae, prefer) for prefer in OURS}

    def runs(self, task: str) -> dict[str, Run]:
        """Each way to decode a latent or to encode pictures."""
        vae, (tile, overlap) = self.vae, self._tiles()[TILED]
        stock = {STOCK: getattr(vae, task)}
        ours = {prefer: getattr(self.lean[prefer], task) for prefer in OURS}
        if task == "encode":
            return {**stock, PLANAR: lambda pictures: vae.encode(_planar(pictures)), **ours}
        tiled = {"tile_x": tile, "tile_y": tile, "overlap": overlap}
        return {
            **stock,
            TILED: lambda latent: vae.decode_tiled(latent, **tiled),
            FALLBACK: fallback(vae),
            **ours,
        }

    def given(self, task: str) -> torch.Tensor:
        """A random latent; or pictures [T, H, W, 3], as nodes hand them over."""
        torch.manual_seed(0)
        if task == "encode":
            return torch.rand(self.frames, self.side, self.side, 3)
        return torch.randn(1, self.vae.latent_channels, *self._latent_sides())

    def edges(self, way: str) -> list[int]:
        """Where tiles or strips of a decode meet, in pixels."""
        if way in OURS:
            rows = self._strip_rows(way)
            return list(range(rows, self.side, rows))
        if way not in self._tiles():
            return []
        edges = self._tile_edges(self.side // 8, *self._tiles()[way])
        return sorted({8 * edge for edge in edges})

    def exact(self, task: str, given: torch.Tensor) -> torch.Tensor:
        """The result in float64."""
        model = copy.deepcopy(self.vae.first_stage_model).double()
        if task == "encode":
            return model.encode(self._samples(self.vae.process_input(given.double())))[0]
        return ((model.decode(given.double()) + 1) / 2).clamp(0, 1).movedim(1, -1)[0]

    def _tiles(self) -> dict[str, tuple[int, int]]:
        """Side and overlap of a tile, in latent pixels."""
        return TILES

    def _tile_edges(self, side: int, tile: int, overlap: int) -> Iterator[int]:
        return tile_edges(side, tile, overlap)

    @abstractmethod
    def _made(self) -> Any:
        """The host's VAE."""

    @abstractmethod
    def _last_conv(self) -> Any:
        """The last convolution of its decoder."""

    @abstractmethod
    def _latent_sides(self) -> tuple[int, ...]:
        """Frames, if it has any, rows and columns of the latent."""

    @abstractmethod
    def _samples(self, pictures: torch.Tensor) -> torch.Tensor:
        """The pictures as its encoder takes them."""

    @abstractmethod
    def _strip_rows(self, prefer: Any) -> int:
        """Rows of the strips in which Lean VAE decodes."""


class Flux(Compared):
    """The AutoencodingEngine of Flux and Z-Image."""

    name = "Flux"

    def _made(self) -> Any:
        from pack.testing.vae_models import engine_vae

        return engine_vae()

    def _last_conv(self) -> Any:
        return self.vae.first_stage_model.decoder.conv_out

    def _latent_sides(self) -> tuple[int, ...]:
        return self.side // 8, self.side // 8

    def _samples(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.movedim(-1, 1)

    def _strip_rows(self, prefer: Any) -> int:
        from pack.nodes.host.vae.patch import example_call
        from pack.nodes.vae.choice import VaeChoice

        plan = VaeChoice(prefer, 0).plan(example_call(self.lean[prefer], self.side))
        assert plan is not None  # the first attempt has a plan
        return plan.levels[-1].limit


class Wan(Compared):
    """The WanVAE of Wan 2.1 and Qwen-Image, which attends as on most cards."""

    name = "Wan 2.1"

    def _made(self) -> Any:
        from pack.testing.video_models import wan_vae

        return wan_vae(dim=96)

    def _last_conv(self) -> Any:
        return self.vae.first_stage_model.decoder.head[-1]

    def _latent_sides(self) -> tuple[int, ...]:
        return (self.frames - 1) // 4 + 1, self.side // 8, self.side // 8

    def _samples(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.movedim(-1, 0)[None]

    def _strip_rows(self, prefer: Any) -> int:
        from pack.nodes.vae.video.choice import VideoChoice

        shape = torch.Size((1, self.vae.latent_channels, *self._latent_sides()))
        forward = self.lean[prefer].first_stage_model.decode
        plan = VideoChoice(prefer, 0).plan(forward.call(shape, torch.float32, self.vae.device))
        assert plan is not None  # the first attempt has a plan
        return plan.rows

    def _tiles(self) -> dict[str, tuple[int, int]]:
        # The node's own tiles of 512 would hold the whole picture.
        tile = max(1, self.side // 16)
        return {TILED: (tile, tile // 4), FALLBACK: (32, 8)}

    def _tile_edges(self, side: int, tile: int, overlap: int) -> Iterator[int]:
        return _edges_of_pass(side, tile, overlap)


VAES: dict[str, type[Compared]] = {"flux": Flux, "wan": Wan}


def _planar(pictures: torch.Tensor) -> torch.Tensor:
    return pictures.movedim(-1, 1).contiguous().movedim(1, -1)


def fallback(vae: Any) -> Run:
    """The host's decode whose first try ends as an out-of-memory error of the card does."""

    def fail(*args: object) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("injected")

    def decode(latent: torch.Tensor) -> torch.Tensor:
        nonlocal handle
        handle = vae.first_stage_model.decoder.register_forward_pre_hook(fail)
        return vae.decode(latent)

    handle: Any = None
    return decode
