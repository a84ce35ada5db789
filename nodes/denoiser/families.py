"""Published models of other families: their sizes, and what a call holds. Integers only.

Their blocks run in pieces under the host's own forward (nodes/host/denoiser/family.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..units import MIB
from .cuts import DenoiserPlan
from .parallel_plan import stock_parallel_elements
from .peak import block_elements
from .plan import DEFAULT, FILL_TOKENS, DenoiserChoice, plan_for
from .sizes import TransformerSizes


@dataclass(frozen=True)
class FamilySizes:
    """A published model.

    name: as users say it.
    sizes: of its transformer, its latent and its text.
    cell_px, latent_px: pixels of the side of a token, and of the latent's cell.
    frames: frames of a video for each frame of the latent after the first; 0: pictures only.
    joins_text: the text's tokens are part of the stream; otherwise it is attended to.
    holds_text: the host's forward holds the embedded text beside the stream.
    rope_bytes: of an element of the rotary table, four for each pair of a head's channels.
    """

    name: str
    sizes: TransformerSizes
    cell_px: int
    latent_px: int
    frames: int = 0
    joins_text: bool = True
    holds_text: bool = True
    rope_bytes: int = 4


def _transformer(
    dim: int, heads: int, ffn_dim: int, stock_elements: int, **others: Any
) -> TransformerSizes:
    return TransformerSizes(
        dim=dim,
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        ffn_dim=ffn_dim,
        refiner_layers=0,
        pad_multiple=1,
        stock_elements=stock_elements,
        **others,
    )


# Source: the published files, as the host's detection reads them.
FLUX2_DEV = FamilySizes(
    "FLUX.2 dev",
    _transformer(
        6144, 48, 18432, 17 * 6144, layers=56, cap_dim=15360, patch=1, channels=128,
        is_parallel=True,
    ),
    cell_px=16, latent_px=16,
)  # fmt: skip
FLUX1_DEV = FamilySizes(
    "FLUX.1 dev",
    _transformer(
        3072, 24, 12288, 14 * 3072, layers=57, cap_dim=4096, is_gated=False, is_parallel=True
    ),
    cell_px=16, latent_px=8,
)  # fmt: skip
QWEN_IMAGE = FamilySizes(
    "Qwen-Image",
    _transformer(
        3072, 24, 12288, 11 * 3072, layers=60, cap_dim=3584, is_gated=False, makes_streams=True
    ),
    cell_px=16, latent_px=8, frames=1, holds_text=False, rope_bytes=2,
)  # fmt: skip
WAN_14B = FamilySizes(
    "Wan 2.1 14B",
    _transformer(
        5120, 40, 13824, 3 * 5120 + 2 * 13824, layers=40, cap_dim=4096, is_gated=False,
        makes_streams=True, norms_across=True,
    ),
    cell_px=16, latent_px=8, frames=4, joins_text=False,
)  # fmt: skip
# Of a usual video.
VIDEO_FRAMES = 81
# By what `run.py plan` calls them.
FAMILIES = {
    "flux2": FLUX2_DEV, "flux1": FLUX1_DEV, "qwen-image": QWEN_IMAGE, "wan": WAN_14B,
}  # fmt: skip


@dataclass(frozen=True)
class FamilyRequest:
    """One call of a family's denoiser.

    frames: of a video; 1: a picture.
    references: pictures of the same size whose tokens join the stream.
    batch: samples in the call, the unconditional ones of guidance included.
    dtype_bytes: bytes per activation element (2 in bfloat16).

    Raises:
        ValueError: a number is too small, or a family has no frames or no joined tokens.
    """

    family: FamilySizes
    width_px: int
    height_px: int
    frames: int = 1
    references: int = 0
    batch: int = 1
    text_tokens: int = 512
    dtype_bytes: int = 2

    def __post_init__(self) -> None:
        cell = self.family.cell_px
        least = {"width_px": cell, "height_px": cell, "references": 0}
        for name in (
            *("width_px", "height_px", "frames", "references", "batch", "text_tokens"),
            "dtype_bytes",
        ):
            value, bound = getattr(self, name), least.get(name, 1)
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        if self.frames > 1 and self.family.frames < 2:
            raise ValueError(f"frames must be 1 for {self.family.name}, got {self.frames}")
        if self.references and not self.family.joins_text:
            raise ValueError(f"references must be 0 for {self.family.name}, got {self.references}")

    @classmethod
    def of_latent(
        cls, family: FamilySizes, shape: Sequence[int], dtype_bytes: int
    ) -> FamilyRequest | None:
        """The call for a latent [B, C, H, W] or [B, C, T, H, W]; None for other latents."""
        frames = shape[2] if len(shape) == 5 else 1
        if len(shape) not in (4, 5) or (frames > 1 and family.frames < 2):
            return None
        height, width = (max(family.cell_px, n * family.latent_px) for n in shape[-2:])
        frames = 1 + (frames - 1) * family.frames
        return cls(family, width, height, frames, batch=shape[0], dtype_bytes=dtype_bytes)

    @property
    def latent_frames(self) -> int:
        """Frames of the latent."""
        return 1 + (self.frames - 1) // max(1, self.family.frames)

    @property
    def tokens(self) -> int:
        """Length of the sequence that attends to itself, per sample."""
        cell = self.family.cell_px
        picture = self.latent_frames * -(-self.width_px // cell) * -(-self.height_px // cell)
        return picture * (1 + self.references) + self.text_tokens * self.family.joins_text

    @property
    def has_parts(self) -> bool:
        """Whether each block has layers of their own for the text and for the picture."""
        return self.family.joins_text and not self.family.sizes.is_parallel

    @property
    def stream_bytes(self) -> int:
        """U: bytes of one residual stream of the whole batch."""
        return self.batch * self.tokens * self.family.sizes.dim * self.dtype_bytes

    @property
    def given_bytes(self) -> int:
        """Bytes of the latent, the references and the text, which the caller holds."""
        family = self.family
        cells = (self.width_px // family.latent_px) * (self.height_px // family.latent_px)
        latents = (1 + self.references) * self.latent_frames * family.sizes.channels * cells
        text = self.text_tokens * family.sizes.cap_dim
        return self.batch * (latents + text) * self.dtype_bytes

    @property
    def around_bytes(self) -> int:
        """Bytes that the host's forward holds beside a block's streams.

        The rotary table of one sample, the embedded text, and a copy of the latent.
        """
        family, sizes = self.family, self.family.sizes
        table = self.tokens * (sizes.head_dim // 2) * 4 * family.rope_bytes
        text = self.batch * self.text_tokens * sizes.dim * self.dtype_bytes
        return table + text * family.holds_text

    def plan(self, choice: DenoiserChoice = DEFAULT, *, fill: int = FILL_TOKENS) -> DenoiserPlan:
        """How its blocks are cut."""
        return plan_for(self.family.sizes, self.batch, (self.tokens,), choice, fill=fill)


def family_peak_bytes(request: FamilyRequest, plan: DenoiserPlan) -> int:
    """The peak of a call whose blocks run in pieces, in bytes; weights excluded.

    The streams of the whole batch, what one sample's block holds, and what the host's forward
    holds around the blocks.

    Source: Flux, QwenImageTransformer2DModel and WanModel of the host's comfy/ldm.
    """
    sizes = request.family.sizes
    part = request.tokens - request.text_tokens * request.has_parts
    elements = block_elements(sizes, request.tokens, plan, part=part)
    block = max(elements, sizes.host_copy) * request.dtype_bytes
    return sizes.streams * request.stream_bytes + block + request.around_bytes + request.given_bytes


def family_stock_bytes(request: FamilyRequest) -> int:
    """The peak of a call of the host's own blocks, in bytes; weights excluded.

    Where the text has a feed-forward of its own, only its two streams live beside the picture's.
    Where weights are copied, a copy may count for more than what a block makes of few tokens.
    """
    sizes = request.family.sizes
    apart = request.text_tokens * request.has_parts
    elements = sizes.stock_elements * (request.tokens - apart) + 2 * apart * sizes.dim
    held = request.batch * elements
    if sizes.is_parallel and sizes.is_copied:
        held = max(held, stock_parallel_elements(sizes, request.batch * request.tokens))
    of_block = held * request.dtype_bytes
    return of_block + request.around_bytes + request.given_bytes


def predicted_family_savings(
    family: FamilySizes, choice: DenoiserChoice, *, dtype_bytes: int, fill: int = FILL_TOKENS
) -> str:
    """The predicted peaks before and after at two sizes, in one line; `fill`: see `plan_for`."""
    parts = []
    is_video = family.frames > 1
    for width, height in ((832, 480), (1280, 720)) if is_video else ((1024, 1024), (2048, 2048)):
        request = FamilyRequest(
            family, width, height, frames=VIDEO_FRAMES if is_video else 1, dtype_bytes=dtype_bytes
        )
        after = family_peak_bytes(request, request.plan(choice, fill=fill))
        before = round(family_stock_bytes(request) / MIB)
        shape = f"{width}x{height}" + (f", {request.frames} frames" if is_video else "")
        parts.append(f"{before} -> {round(after / MIB)} MiB predicted at {shape}")
    return f"activations {' · '.join(parts)}"
