"""Published U-Nets: their sizes, and what a call holds. Integers only.

Their parts run in pieces under the host's own forward (nodes/host/denoiser/unet.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..units import MIB
from .cuts import DenoiserPlan
from .peak import block_elements
from .plan import DEFAULT, FILL_TOKENS, DenoiserChoice, plan_for
from .sizes import PIXELS_PER_LATENT, TransformerSizes

# What the host's transformer block holds of a token at its peak, in streams: the product for both
# factors of the feed-forward, its GELU and their product, and four of the stream's width.
STOCK_STREAMS = 20
# Channels of the latent.
LATENT_CHANNELS = 4


@dataclass(frozen=True)
class UNetSizes:
    """A published U-Net of Stable Diffusion.

    name: as users say it.
    channels: of its largest maps.
    factors: of the channels, level by level; each level has half of the one before's sides.
    attends: whether a level has transformer blocks.
    head_dim: channels of a head; 0: there are `heads` heads instead.
    cap_dim: width of the text encoder's hidden states, in elements.
    trained_px: a side of the pictures that it was trained on.
    blocks: blocks of a level on the way down; one more on the way up.
    """

    name: str
    channels: int
    factors: tuple[int, ...]
    attends: tuple[bool, ...]
    head_dim: int
    heads: int
    cap_dim: int
    trained_px: int
    blocks: int = 2

    def sizes(self, level: int) -> TransformerSizes:
        """Of the transformer blocks of a level."""
        dim = self.channels * self.factors[level]
        heads = dim // self.head_dim if self.head_dim else self.heads
        return TransformerSizes(
            dim=dim,
            heads=heads,
            kv_heads=heads,
            head_dim=dim // heads,
            ffn_dim=4 * dim,
            layers=1,
            refiner_layers=0,
            cap_dim=self.cap_dim,
            patch=2**level,
            channels=LATENT_CHANNELS,
            pad_multiple=1,
            # What its plans allow was tried out with two streams less.
            stock_elements=(STOCK_STREAMS - 2) * dim,
        )

    @property
    def top(self) -> int:
        """The first level with transformer blocks, whose stream is the largest."""
        return self.attends.index(True)


SDXL = UNetSizes("SDXL", 320, (1, 2, 4), (False, True, True), 64, 0, 2048, 1024)
SD15 = UNetSizes("SD1.5", 320, (1, 2, 4, 4), (True, True, True, False), 0, 8, 768, 512)
# By what `run.py plan` calls them.
UNETS = {"sdxl": SDXL, "sd15": SD15}


@dataclass(frozen=True)
class UNetRequest:
    """One call of a U-Net; `batch` counts the unconditional samples of guidance too.

    Raises:
        ValueError: a number is too small.
    """

    family: UNetSizes
    width_px: int
    height_px: int
    batch: int = 2
    text_tokens: int = 77
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        side = PIXELS_PER_LATENT * 2 ** (len(self.family.factors) - 1)
        least = {"width_px": side, "height_px": side}
        for name in ("width_px", "height_px", "batch", "text_tokens", "dtype_bytes"):
            value, bound = getattr(self, name), least.get(name, 1)
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")

    def pixels(self, level: int) -> int:
        """Of one sample's maps, which are the tokens of its stream."""
        sides = (self.width_px // PIXELS_PER_LATENT, self.height_px // PIXELS_PER_LATENT)
        width, height = (-(-side // 2**level) for side in sides)
        return width * height

    @property
    def stream_bytes(self) -> int:
        """U: bytes of the largest residual stream of the whole batch."""
        top = self.family.top
        dim = self.family.sizes(top).dim
        return self.batch * self.pixels(top) * dim * self.dtype_bytes

    def plan(
        self, choice: DenoiserChoice = DEFAULT, *, fill: int = FILL_TOKENS, level: int | None = None
    ) -> DenoiserPlan:
        """How the transformer blocks of a level are cut; by default of the largest stream's."""
        at = self.family.top if level is None else level
        return plan_for(self.family.sizes(at), self.batch, (self.pixels(at),), choice, fill=fill)


def unet_stock_bytes(request: UNetRequest) -> int:
    """The peak of a call of the host's own U-Net, in bytes; weights excluded."""
    return _peak_bytes(request, None, FILL_TOKENS)


def unet_peak_bytes(
    request: UNetRequest, choice: DenoiserChoice = DEFAULT, *, fill: int = FILL_TOKENS
) -> int:
    """The peak on the card of a call in pieces, in bytes; weights excluded.

    With "smallest", skip tensors wait in RAM. Otherwise all but the first stay; it is computed
    again where it is used.

    Source: UNetModel of the host's comfy/ldm/modules/diffusionmodules/openaimodel.py.
    """
    return _peak_bytes(request, choice, fill)


def _peak_bytes(request: UNetRequest, choice: DenoiserChoice | None, fill: int) -> int:
    family = request.family
    text = request.text_tokens * family.cap_dim
    given = request.batch * (LATENT_CHANNELS * request.pixels(0) + text)
    return request.dtype_bytes * (given + max(_of_joins(request, choice, fill)))


def _of_joins(request: UNetRequest, choice: DenoiserChoice | None, fill: int) -> Iterator[int]:
    """Elements at each join of a map with its skip tensor, and at the transformer block after it.

    On the way up maps and skip tensors are largest together: what comes before them peaks lower.
    """
    family = request.family
    levels = range(len(family.factors))

    def of_map(channels: int, level: int) -> int:
        return request.batch * channels * request.pixels(level)

    def width(level: int) -> int:
        return family.channels * family.factors[level]

    waiting = [(family.channels, 0)]
    for level in levels:
        waiting += [(width(level), level)] * family.blocks
        if level + 1 in levels:
            waiting.append((width(level), level + 1))
    in_ram = choice is not None and choice.prefer == "smallest"
    before = width(levels[-1])
    for level in reversed(levels):
        for _ in range(family.blocks + 1):
            channels, _ = waiting.pop()
            on_card = [] if in_ram else waiting[choice is not None :]
            skips = sum(of_map(*skip) for skip in on_card)
            joined = of_map(before + channels, level)
            yield skips + 2 * joined  # beside the map and its skip tensor
            before = width(level)
            if not family.attends[level]:
                continue
            stream, sizes = of_map(before, level), family.sizes(level)
            if choice is None:
                block = STOCK_STREAMS * stream
            else:
                plan = request.plan(choice, fill=fill, level=level)
                block = 2 * stream + block_elements(sizes, request.pixels(level), plan)
            yield skips + joined + stream + block


def predicted_unet_savings(
    family: UNetSizes, choice: DenoiserChoice, *, dtype_bytes: int, fill: int = FILL_TOKENS
) -> str:
    """The predicted peaks before and after at two sizes, in one line; `fill`: see `plan_for`."""
    parts = []
    for side in (1, 2):
        side_px = side * family.trained_px
        request = UNetRequest(family, side_px, side_px, dtype_bytes=dtype_bytes)
        after = unet_peak_bytes(request, choice, fill=fill)
        before = round(unet_stock_bytes(request) / MIB)
        parts.append(f"{before} -> {round(after / MIB)} MiB predicted at {side_px}x{side_px}")
    return f"activations {' · '.join(parts)}, both prompts together"
