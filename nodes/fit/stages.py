"""The stages of a run, and what each needs on the card with each of our nodes' settings."""

from __future__ import annotations

from dataclasses import dataclass

from ..attention.budget import AUTO_HEADS
from ..denoiser.need import denoiser_live_bytes, denoiser_need_bytes
from ..denoiser.peak import stock_peak_bytes
from ..denoiser.plan import DEFAULT_GROUPS
from ..denoiser.sizes import Z_IMAGE, Request, TransformerSizes
from ..vae.choice import VaeChoice
from ..vae.need import VAE_RESERVED, vae_need_bytes
from ..vae.peak import vae_parameters, vae_peak_bytes
from ..vae.plan import PREFERENCES, Prefer, VaeCall, VaeSizes
from .text_encoder import QWEN3_4B, text_encoder_peak_bytes

FLUX_DECODER = VaeSizes()
FLUX_ENCODER = VaeSizes(is_decoder=False, widths=(128, 256, 512, 512), blocks=2, latent_channels=32)


@dataclass(frozen=True)
class Stage:
    """One stage with one setting.

    name: text encode, denoise, VAE decode or VAE encode.
    setting: of our nodes, for a reader.
    weight_bytes: all weights of the stage's model, wherever they are.
    buffer_bytes: room for the weights in use, where not all weights are resident.
    activation_bytes: peak of live tensors.
    stock_bytes: peak of live tensors with the host alone.
    workspace_bytes: kept free besides, for kernels and the allocator.
    is_repeated: the stage runs once per sampling step, and streams weights each time.
    is_judged: it counts for what fits. The host's own decode does not: it tiles when it must.
    block_bytes: a block's weights in the type of the arithmetic; part of buffers or workspaces.
    is_cast: resident weights are cast to that type too.
    """

    name: str
    setting: str
    weight_bytes: int
    buffer_bytes: int
    activation_bytes: int
    stock_bytes: int
    workspace_bytes: int
    is_repeated: bool = False
    is_judged: bool = True
    block_bytes: int = 0
    is_cast: bool = False

    @property
    def need_bytes(self) -> int:
        """Everything but weights."""
        return self.activation_bytes + self.workspace_bytes

    @property
    def least_bytes(self) -> int:
        """The smallest budget in which the stage fits, workspaces included."""
        return self.hard_least_bytes + self.workspace_bytes

    @property
    def hard_least_bytes(self) -> int:
        """The smallest budget in which it can run at all: live tensors and the weights in use."""
        return self.activation_bytes + min(self.buffer_bytes, self.weight_bytes)

    def resident_bytes(self, budget_bytes: int | None) -> int:
        """Of the model's weights, those that stay on the card."""
        if budget_bytes is None or self.need_bytes + self.weight_bytes <= budget_bytes:
            return self.weight_bytes
        return max(0, budget_bytes - self.need_bytes - self.buffer_bytes)

    def streamed_bytes(self, budget_bytes: int | None) -> int:
        """Of the model's weights, those that come from RAM each time."""
        return self.weight_bytes - self.resident_bytes(budget_bytes)

    def held_bytes(self, budget_bytes: int | None) -> int:
        """The most that torch's allocator holds of a block's weights besides the activations."""
        is_held = self.is_cast or self.streamed_bytes(budget_bytes) > 0
        return self.block_bytes if is_held else 0

    def weights_on_card_bytes(self, budget_bytes: int | None) -> int:
        """What weights take of the card: the resident ones, and the buffers for the others."""
        resident = self.resident_bytes(budget_bytes)
        return resident + (self.buffer_bytes if resident < self.weight_bytes else 0)

    def peak_bytes(self, budget_bytes: int | None) -> int:
        """The most that the stage takes of the card."""
        return self.need_bytes + self.weights_on_card_bytes(budget_bytes)


@dataclass(frozen=True)
class Models:
    """The models of a run.

    denoiser_weight_bytes, text_weight_bytes, vae_weight_bytes: as stored on disk or in RAM.
    vae_dtype_bytes: of one element in the VAE's arithmetic.
    text_adds_in_place: see `text_encoder_peak_bytes`.
    has_ram, is_unrolled: of the card, see `VaeCall`.
    """

    denoiser_weight_bytes: int
    text_weight_bytes: int
    vae_weight_bytes: int
    denoiser: TransformerSizes = Z_IMAGE
    decoder: VaeSizes = FLUX_DECODER
    vae_dtype_bytes: int = 2
    has_ram: bool = True
    text_adds_in_place: bool = False
    is_unrolled: bool = False


def published_models(*, weight_bits: float = 16) -> Models:
    """Z-Image-Turbo as published, with `weight_bits` for each weight of the transformer."""
    return Models(
        denoiser_weight_bytes=int(Z_IMAGE.parameters * weight_bits / 8),
        text_weight_bytes=2 * QWEN3_4B.parameters,
        vae_weight_bytes=2 * (vae_parameters(FLUX_DECODER) + vae_parameters(FLUX_ENCODER)),
    )


def text_stage(models: Models, tokens: int) -> Stage:
    """The encoding of one prompt, which is the host's own."""
    live = text_encoder_peak_bytes(tokens, adds_in_place=models.text_adds_in_place)
    embedding = QWEN3_4B.vocabulary * QWEN3_4B.hidden
    return Stage(
        "text encode",
        "ComfyUI's own, not limited",
        weight_bytes=models.text_weight_bytes,
        buffer_bytes=models.text_weight_bytes * embedding // QWEN3_4B.parameters,
        activation_bytes=live,
        stock_bytes=live,
        workspace_bytes=int((VAE_RESERVED - 1) * live),
    )


def denoise_stages(models: Models, request: Request, *, is_plain: bool = True) -> tuple[Stage, ...]:
    """One stage for each of `head_groups`, the fastest first.

    A request that is not plain gets lean blocks under the host's own forward.
    """
    sizes = models.denoiser
    # Of a block's weights, those of its larger part, the feed-forward, are held at once in the type
    # of the arithmetic: cast, or copied out of the host's two buffers for its largest matrix.
    part = 3 * sizes.dim * sizes.ffn_dim * request.dtype_bytes
    largest = sizes.dim * max(sizes.qkv_dim, sizes.ffn_dim)
    buffers = 2 * models.denoiser_weight_bytes * largest // sizes.parameters
    is_cast = models.denoiser_weight_bytes < sizes.parameters * request.dtype_bytes

    def stage(groups: int) -> Stage:
        name = f"{groups} head groups" if groups < sizes.kv_heads else "one head at a time"
        live = denoiser_live_bytes(request, groups, is_plain=is_plain)
        return Stage(
            "denoise",
            f"Apply Gradient Checkpoint, {name}",
            weight_bytes=models.denoiser_weight_bytes,
            buffer_bytes=buffers + (0 if is_cast else part),
            activation_bytes=live,
            stock_bytes=stock_peak_bytes(request),
            workspace_bytes=denoiser_need_bytes(live) - live + (part if is_cast else 0),
            is_repeated=True,
            block_bytes=part,
            is_cast=is_cast,
        )

    return tuple(stage(groups) for groups in head_groups(sizes))


def head_groups(sizes: TransformerSizes) -> tuple[int, int, int]:
    """The numbers of head groups to choose from, the fastest first."""
    auto = max(DEFAULT_GROUPS, -(-sizes.kv_heads // AUTO_HEADS))
    return DEFAULT_GROUPS, auto, max(auto, sizes.kv_heads)


def vae_stages(models: Models, request: Request, *, is_decode: bool = True) -> tuple[Stage, ...]:
    """One stage for each preference of Lean VAE, the fastest first."""
    return tuple(vae_stage(models, request, p, is_decode=is_decode) for p in PREFERENCES)


def vae_stage(
    models: Models, request: Request, prefer: Prefer | None, *, is_decode: bool = True
) -> Stage:
    """The decode or encode of all samples, one after the other; prefer None: the host's own."""
    sizes = models.decoder if is_decode else FLUX_ENCODER
    height, width = (side * sizes.factor for side in request.latent_shape[-2:])
    on_device = models.vae_dtype_bytes, models.has_ram, models.is_unrolled
    call = VaeCall(sizes, height, width, *on_device)
    plan = None if prefer is None else VaeChoice(prefer, strip_rows=0).plan(call)
    live, stock = (vae_peak_bytes(call, request.batch, how) for how in (plan, None))
    return Stage(
        "VAE decode" if is_decode else "VAE encode",
        "ComfyUI's own" if prefer is None else f"Lean VAE {prefer}",
        weight_bytes=models.vae_weight_bytes,
        buffer_bytes=models.vae_weight_bytes,
        activation_bytes=live,
        stock_bytes=stock,
        workspace_bytes=vae_need_bytes(live) - live,
        is_judged=prefer is not None,
    )
