"""The stages of a run, and what each needs on the card with each of our nodes' settings."""

from __future__ import annotations

from dataclasses import dataclass

from ..denoiser.cost import step_work
from ..denoiser.need import casts_weights, denoiser_live_bytes, denoiser_need_bytes
from ..denoiser.peak import stock_peak_bytes
from ..denoiser.plan import FILL_TOKENS, DenoiserChoice, denoiser_plan
from ..denoiser.sizes import Z_IMAGE, Request, TransformerSizes, round_up
from ..prefer import PREFERENCES, Prefer
from ..units import MIB, PAGE_BYTES
from ..vae.choice import VaeChoice
from ..vae.need import VAE_RESERVED, vae_need_bytes
from ..vae.peak import lean_vae_ram_bytes, vae_parameters, vae_peak_bytes
from ..vae.plan import VaeCall, VaeSizes
from ..words import Words
from .stage import Stage
from .text_encoder import MATH_SCORE, QWEN3_4B, TextEncoderSizes, text_encoder_peak_bytes

# What Fit to VRAM chooses from: each can be set on Apply Gradient Checkpoint.
DENOISER_CHOICES = (
    DenoiserChoice("speed"),
    *(DenoiserChoice("balance", groups) for groups in (0, 2, 3, 5)),
    DenoiserChoice("smallest"),
)
BUFFER_STEP_BYTES = 16 * MIB  # by which comfy_aimdo's buffers for streamed weights grow

ALONE = Words("alone", "ComfyUI's own")
FLUX_DECODER = VaeSizes()
FLUX_ENCODER = VaeSizes(is_decoder=False, widths=(128, 256, 512, 512), blocks=2, latent_channels=32)


@dataclass(frozen=True)
class Models:
    """The models of a run.

    denoiser_weight_bytes, text_weight_bytes, vae_weight_bytes: as stored on disk or in RAM.
    control_weight_bytes: of the ControlNets, which the host loads with the denoiser.
    text_table_bytes: of the text encoder's embedding table; 0 if it cannot stay in RAM.
    vae_dtype_bytes: of one element in the VAE's arithmetic.
    text_adds_in_place, text_bytes_per_score: see `text_encoder_peak_bytes`.
    has_ram, is_unrolled: of the card, see `VaeCall`.
    is_dynamic: the host keeps weights in pages (dynamic VRAM).
    has_prefetch: the host can prefetch blocks of such a model.
    fill_tokens: rows with which a product fills the card, see `plan_for`.
    """

    denoiser_weight_bytes: int
    text_weight_bytes: int
    vae_weight_bytes: int
    control_weight_bytes: int = 0
    text_table_bytes: int = 2 * QWEN3_4B.table
    denoiser: TransformerSizes = Z_IMAGE
    text: TextEncoderSizes = QWEN3_4B
    decoder: VaeSizes = FLUX_DECODER
    vae_dtype_bytes: int = 2
    has_ram: bool = True
    text_adds_in_place: bool = False
    text_bytes_per_score: int = MATH_SCORE
    is_unrolled: bool = False
    is_dynamic: bool = True
    has_prefetch: bool = True
    fill_tokens: int = FILL_TOKENS

    @property
    def page_bytes(self) -> int:
        return PAGE_BYTES if self.is_dynamic else 1

    def on_card_bytes(self, weight_bytes: int) -> int:
        """What a model's weights take of the card."""
        return round_up(weight_bytes, self.page_bytes)

    def buffers_bytes(self, largest_bytes: int, count: int = 2) -> int:
        """The host's buffers for streamed weights, of which the largest has `largest_bytes`."""
        step = BUFFER_STEP_BYTES if self.is_dynamic else 1
        return count * round_up(largest_bytes, step)


def published_models(*, weight_bits: float = 16) -> Models:
    """Z-Image-Turbo as published, with `weight_bits` for each weight of the transformer."""
    return Models(
        denoiser_weight_bytes=int(Z_IMAGE.parameters * weight_bits / 8),
        text_weight_bytes=2 * QWEN3_4B.parameters,
        vae_weight_bytes=2 * (vae_parameters(FLUX_DECODER) + vae_parameters(FLUX_ENCODER)),
    )


def text_stage(
    models: Models, tokens: int, *, is_limited: bool = False, gathers_rows: bool = False
) -> Stage:
    """The encoding of one prompt, which is the host's own.

    Args:
        is_limited: its weights are kept within the budget.
        gathers_rows: the embedding table stays in RAM, where the prompt's rows are gathered.
    """
    sizes = models.text
    live = text_encoder_peak_bytes(
        tokens,
        sizes,
        adds_in_place=models.text_adds_in_place,
        bytes_per_score=models.text_bytes_per_score,
    )
    table = models.text_table_bytes or models.text_weight_bytes * sizes.table // sizes.parameters
    layers = models.text_weight_bytes - table
    largest = layers * sizes.largest_matrix // (sizes.parameters - sizes.table)
    setting = Words("notLimited", "ComfyUI's own, not limited")
    if is_limited:
        setting = Words("limited", "ComfyUI's own, limited")
    buffers = models.buffers_bytes(largest)
    if gathers_rows:
        setting = Words("tableInRam", "$1; embedding table in RAM", setting)
    else:
        buffers = max(buffers, models.buffers_bytes(table, count=1))
    return Stage(
        "text encode",
        setting,
        weight_bytes=layers if gathers_rows else models.text_weight_bytes,
        buffer_bytes=buffers,
        activation_bytes=live,
        stock_bytes=live,
        workspace_bytes=int((VAE_RESERVED - 1) * live),
        page_bytes=models.page_bytes,
        score_bytes=models.text_bytes_per_score * sizes.heads * tokens**2,
    )


def denoise_stages(
    models: Models, request: Request, *, prefer: Prefer = "speed", is_plain: bool = True
) -> dict[DenoiserChoice, Stage]:
    """One stage for each of `DENOISER_CHOICES` that a preference allows, the fastest first.

    A request that is not plain gets lean blocks under the host's own forward.
    """
    sizes = models.denoiser
    buffers = _denoiser_buffers_bytes(models)
    is_cast = casts_weights(request, models.denoiser_weight_bytes)
    block = sizes.block_parameters + sizes.modulation_parameters
    block = models.denoiser_weight_bytes * block // sizes.parameters
    has_prefetch = models.has_prefetch and models.is_dynamic and is_plain
    prefetch = models.buffers_bytes(block) if has_prefetch else 0
    count = len(request.controls)

    def setting(choice: DenoiserChoice) -> Words:
        words = Words("gradient", "Apply Gradient Checkpoint: prefer $1", choice)
        if count == 1:
            return Words("control", "$1; with a ControlNet", words)
        return Words("controls", "$1; with $2 ControlNets", words, count) if count else words

    def stage(choice: DenoiserChoice) -> Stage:
        plan = denoiser_plan(request, choice, fill=models.fill_tokens)
        live = denoiser_live_bytes(request, plan, is_plain=is_plain)
        copies = 0 if is_cast else live.copied - live.plain
        return Stage(
            "denoise",
            setting(choice),
            weight_bytes=models.denoiser_weight_bytes + models.control_weight_bytes,
            buffer_bytes=buffers + copies,
            activation_bytes=live.peak(has_copies=is_cast),
            stock_bytes=stock_peak_bytes(request, has_copies=is_cast),
            workspace_bytes=denoiser_need_bytes(live.plain) - live.plain,
            page_bytes=models.page_bytes,
            is_repeated=True,
            copy_bytes=copies,
            prefetch_bytes=prefetch,
            control_copy_bytes=copies if request.controls else 0,
            is_cast=is_cast,
            work=step_work(request, plan),
        )

    first = PREFERENCES.index(prefer)
    return {c: stage(c) for c in DENOISER_CHOICES if PREFERENCES.index(c.prefer) >= first}


def stock_denoise_stage(models: Models, request: Request) -> Stage:
    """The denoising of the host alone, with the same allowance for workspaces as ours."""
    is_cast = casts_weights(request, models.denoiser_weight_bytes)
    live = stock_peak_bytes(request, has_copies=is_cast)
    plain = stock_peak_bytes(request)
    return Stage(
        "denoise",
        ALONE,
        weight_bytes=models.denoiser_weight_bytes + models.control_weight_bytes,
        buffer_bytes=_denoiser_buffers_bytes(models),
        activation_bytes=live,
        stock_bytes=live,
        workspace_bytes=denoiser_need_bytes(plain) - plain,
        page_bytes=models.page_bytes,
        is_repeated=True,
        is_cast=is_cast,
    )


def _denoiser_buffers_bytes(models: Models) -> int:
    """The host's buffers for the transformer's weights in use."""
    sizes = models.denoiser
    largest = sizes.dim * max(sizes.qkv_dim, sizes.ffn_dim)
    return models.buffers_bytes(models.denoiser_weight_bytes * largest // sizes.parameters)


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
        ALONE if prefer is None else Words("leanVae", "Lean VAE $1", prefer),
        weight_bytes=models.vae_weight_bytes,
        buffer_bytes=models.vae_weight_bytes,
        activation_bytes=live,
        stock_bytes=stock,
        workspace_bytes=vae_need_bytes(live) - live,
        page_bytes=models.page_bytes,
        ram_bytes=0 if plan is None else lean_vae_ram_bytes(call, plan),
        is_judged=prefer is not None,
    )
