"""Z-Image's sizes, and the tokens and bytes that a request makes of them. Integers only."""

from __future__ import annotations

from dataclasses import dataclass

from ..words import Words

PIXELS_PER_LATENT = 8
# Widths of Z-Image's timestep embedding: hidden, and what modulates the blocks.
TIME_DIM, MODULATION_DIM = 1024, 256


@dataclass(frozen=True)
class TransformerSizes:
    """The sizes of one NextDiT transformer; the defaults are Z-Image's.

    dim: width of the residual stream, in elements.
    ffn_dim: width of the feed-forward's hidden tensors, in elements.
    layers: main blocks; `refiner_layers` of the image and as many of the text come before them.
    cap_dim: width of the text encoder's hidden states, in elements.
    patch: latent rows and columns per image token.
    pad_multiple: image and text tokens are each padded to a multiple of this.
    is_whole: each call of a linear layer of some block computes all output features (quantised
        layers), so q, k and v of all heads live at a time.
    is_dequantised: copies of weights of some block are in the dtype of the activations.
    is_quantised: layers of some block quantise their rows, and give the columns that are asked for
        in a new tensor. row_bits: of an element of those rows; 0 where the product quantises them.
    is_copied: weights of some block are copied in the dtype of the activations, some columns at a
        time; whole where a layer `is_whole`.
    host_copy: elements of the largest weight that the host copies beside the streams, in a layer
        that no part of ours runs.
    has_features: features of reference pictures (SigLIP) are tokens too.
    is_gated: the feed-forward has two factors.
    is_parallel: in some block the feed-forward runs beside the attention, on the same rows (FLUX).
    makes_streams: a block makes a new stream while its caller holds the old one.
    norms_across: the norms of q and k span all heads (Wan), so that each product is made whole.
    stock_elements: what the host's block holds of a token at its peak; 0: four hidden tensors and
        four streams.
    """

    dim: int = 3840
    heads: int = 30
    kv_heads: int = 30
    head_dim: int = 128
    ffn_dim: int = 10240
    layers: int = 30
    refiner_layers: int = 2
    cap_dim: int = 2560
    patch: int = 2
    channels: int = 16
    pad_multiple: int = 32
    is_whole: bool = False
    is_dequantised: bool = False
    is_quantised: bool = False
    row_bits: int = 0
    is_copied: bool = False
    host_copy: int = 0
    has_features: bool = False
    is_gated: bool = True
    is_parallel: bool = False
    makes_streams: bool = False
    norms_across: bool = False
    stock_elements: int = 0

    def __post_init__(self) -> None:
        if self.heads * self.head_dim != self.dim:
            raise ValueError(
                f"heads x head_dim must be dim, got {self.heads} x {self.head_dim} != {self.dim}"
            )

    @property
    def qkv_dim(self) -> int:
        """Width of the packed query, key and value projection, in elements."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def streams(self) -> int:
        """Residual streams that live while a block runs."""
        return 2 if self.makes_streams else 1

    @property
    def patch_dim(self) -> int:
        """Latent elements of one image token."""
        return self.patch * self.patch * self.channels

    @property
    def block_parameters(self) -> int:
        """Elements of the weights of a block that is not modulated."""
        block = self.dim * self.qkv_dim + self.dim**2 + 2 * self.head_dim
        return block + 3 * self.dim * self.ffn_dim + 4 * self.dim

    @property
    def modulation_parameters(self) -> int:
        """Elements of the weights that a modulated block has besides."""
        return (MODULATION_DIM + 1) * 4 * self.dim

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        blocks = self.layers + 2 * self.refiner_layers
        total = blocks * self.block_parameters
        total += (blocks - self.refiner_layers) * self.modulation_parameters
        total += (self.patch_dim + 2) * self.dim + self.patch_dim  # patches in and out
        total += self.patch_dim * self.dim + (MODULATION_DIM + 1) * self.dim
        total += self.cap_dim + (self.cap_dim + 1) * self.dim + self.dim  # text, padding
        return total + (2 * MODULATION_DIM + 1) * TIME_DIM + MODULATION_DIM


Z_IMAGE = TransformerSizes()


@dataclass(frozen=True)
class ControlSizes:
    """The sizes of one Z-Image Fun ControlNet; the defaults are those of Union 2.1.

    Its blocks have the widths of the transformer that it controls.

    layers: control blocks for the main blocks.
    is_refining: two more are for the image refiner; otherwise two plain blocks refine the hint.
    is_doubled: in the image refiner all control blocks run, as in Union 2.0.
    channels: of the hint; 33 where it may be a mask and a picture beside the latent.
    """

    layers: int = 15
    is_refining: bool = True
    is_doubled: bool = False
    channels: int = 33

    @property
    def blocks(self) -> int:
        """Blocks that run in a step."""
        return 2 * self.layers if self.is_doubled else self.layers + 2

    @property
    def refiner_streams(self) -> int:
        """How many of its streams live while a block of the image refiner runs.

        Its own, and what it added last. Where all its blocks run at a time, also what it adds next,
        and what the last of them would add. In the main blocks they are the first two.
        """
        if self.is_doubled:
            return 4
        return 2 if self.is_refining else 1

    def parameters(self, sizes: TransformerSizes) -> int:
        """Elements of all weights, beside a transformer of those sizes."""
        refiner_layers = 2
        blocks = self.layers + refiner_layers
        controls = self.layers + (refiner_layers if self.is_refining else 0)
        # After each control block one more product, and one before the first.
        products = controls + 1 + self.is_refining
        total = blocks * (sizes.block_parameters + sizes.modulation_parameters)
        total += products * (sizes.dim + 1) * sizes.dim
        return total + (sizes.patch**2 * self.channels + 1) * sizes.dim


# By their control layers: Union 2.1 lite, Union, Union 2.1.
UNIONS = {
    net.layers: net
    for net in (ControlSizes(3), ControlSizes(6, is_refining=False, channels=16), ControlSizes())
}


@dataclass(frozen=True)
class Request:
    """One call of the denoiser: a picture size, a batch and a prompt length.

    width_px, height_px: the picture; the latent has an eighth of them, rounded down.
    batch: samples in the call, the unconditional ones of guidance included.
    text_tokens: prompt length before padding.
    dtype_bytes: bytes per activation element (2 in bfloat16).
    reference_tokens, reference_text_tokens, reference_feature_tokens: of all reference pictures, of
        their texts and of their features, per sample, with padding.
    has_patches: patches of other nodes run between the blocks.
    has_refiner_patches: between those of the image refiner too, as of a ControlNet.
    controls: ControlNets that run beside the denoiser.
    """

    width_px: int
    height_px: int
    batch: int = 1
    text_tokens: int = 256
    dtype_bytes: int = 2
    sizes: TransformerSizes = Z_IMAGE
    reference_tokens: int = 0
    reference_text_tokens: int = 0
    reference_feature_tokens: int = 0
    has_patches: bool = False
    has_refiner_patches: bool = False
    controls: tuple[ControlSizes, ...] = ()

    def __post_init__(self) -> None:
        least = {"width_px": PIXELS_PER_LATENT, "height_px": PIXELS_PER_LATENT}
        for name in ("width_px", "height_px", "batch", "text_tokens", "dtype_bytes"):
            value, bound = getattr(self, name), least.get(name, 1)
            if value < bound:
                raise ValueError(Words("least", "$1 must be >= $2, got $3", name, bound, value))

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape of the latent that the denoiser is called with, [B, C, H, W]."""
        height, width = self.height_px // PIXELS_PER_LATENT, self.width_px // PIXELS_PER_LATENT
        return self.batch, self.sizes.channels, height, width

    @property
    def image_tokens(self) -> int:
        """Patches of one picture; the host fills up the last row and column of the latent."""
        _, _, height, width = self.latent_shape
        return -(-height // self.sizes.patch) * -(-width // self.sizes.patch)

    @property
    def padded_image_tokens(self) -> int:
        """Image tokens with padding, per sample."""
        return round_up(self.image_tokens, self.sizes.pad_multiple)

    @property
    def padded_text_tokens(self) -> int:
        """Text tokens with padding, per sample."""
        return round_up(self.text_tokens, self.sizes.pad_multiple)

    @property
    def tokens(self) -> int:
        """Length of the sequence in the main blocks, per sample."""
        return sum(self.refined) + self.reference_feature_tokens

    @property
    def refined(self) -> tuple[int, int]:
        """Tokens per sample in the image refiner and the text refiner."""
        image = self.padded_image_tokens + self.reference_tokens
        return image, self.padded_text_tokens + self.reference_text_tokens

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Tokens per sample in the main blocks, the image refiner and the text refiner.

        Features have a refiner too, where far fewer are.
        """
        return (self.tokens, *self.refined)

    @property
    def stream_bytes(self) -> int:
        """U: bytes of one residual stream of the whole batch."""
        return self.batch * self.tokens * self.sizes.dim * self.dtype_bytes

    @property
    def rope_bytes(self) -> int:
        """Bytes of the host's rope table: 2 x 2 float32 per pair of channels, for one sample."""
        return self.tokens * (self.sizes.head_dim // 2) * 4 * 4


def round_up(count: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
