"""The activation peaks of the denoiser's forwards, ours and the host's, as formulas."""

from __future__ import annotations

import functools
from typing import NamedTuple

from .cuts import DenoiserPlan, longest_chunk
from .parallel_plan import parallel_elements
from .products import product_elements
from .sizes import Request, TransformerSizes

# Of one token in the rope tables of the axes: eight indices of 4 bytes.
ROPE_INDEX_BYTES = 32


class Copies(NamedTuple):
    """Elements that a block copies of its weights: of qkv, of out, and of each of w1, w2 and w3.

    is_batch: samples after the first find all of them fetched.
    """

    qkv: int = 0
    out: int = 0
    feed_forward: int = 0
    is_batch: bool = False

    @classmethod
    def of(cls, request: Request) -> Copies:
        """Copies in the dtype of the activations; quantised weights stay as stored, in a byte."""
        sizes = request.sizes
        is_stored = sizes.is_whole and not sizes.is_dequantised
        row = sizes.dim // (request.dtype_bytes if is_stored else 1)
        is_batch = request.batch > 1
        return cls(sizes.qkv_dim * row, sizes.dim * row, sizes.ffn_dim * row, is_batch)


NO_COPIES = Copies()


def lean_peak_bytes(request: Request, plan: DenoiserPlan, *, has_copies: bool = False) -> int:
    """The peak of the lean whole forward, in bytes; weights and kernel workspaces excluded.

    One stream of the whole batch, and for one sample the larger of its attention and its
    feed-forward. The refiners see part of the stream, which may have a longer chunk.

    Args:
        has_copies: the weights are cast, streamed or patched, so that each half of a block holds
            copies of its weights. What the host holds while it makes one is not counted: the
            stored form of a weight that is both streamed and cast, the products of a LoRA.
    """
    tokens = request.tokens
    copies = Copies.of(request) if has_copies else NO_COPIES
    # Patches of other nodes get the pictures as they were before the first block, and the table. In
    # the main blocks that is the drawn picture alone.
    row = request.batch * request.sizes.dim
    nets = request.controls
    begin = (
        request.padded_image_tokens if request.has_patches else 0,
        request.refined[0] if request.has_refiner_patches or nets else 0,
        0,
    )
    streams = 2 * len(nets), sum(control.refiner_streams for control in nets), 0
    # What a ControlNet adds next is made after its block.
    added = copies.out + request.image_tokens * row if nets else 0
    block = max(
        max(block_elements(request.sizes, length, plan, copies), added)
        + (kept + count * request.image_tokens) * row
        for length, kept, count in zip(request.lengths, begin, streams, strict=True)
    )
    elements = request.batch * tokens * request.sizes.dim + block
    holds_rope = plan.holds_rope or request.has_patches
    rope = request.rope_bytes if holds_rope else ROPE_INDEX_BYTES * tokens
    return elements * request.dtype_bytes + _latent_and_text_bytes(request) + rope


def block_elements(
    sizes: TransformerSizes,
    tokens: int,
    plan: DenoiserPlan,
    copies: Copies = NO_COPIES,
    *,
    part: int | None = None,
) -> int:
    """Elements that a block holds beside the stream, for a sample of that many tokens.

    Args:
        part: tokens of the longest part, where parts that are attended to together have layers of
            their own; None: all.
    """
    part = tokens if part is None else part
    attention = attention_elements(sizes, tokens, plan, copies, part=part)
    halves = max(attention, feed_forward_elements(sizes, part, plan, copies))
    if plan.parallel is None:
        return halves
    return max(halves, parallel_elements(sizes, tokens, plan.parallel))


def attention_elements(
    sizes: TransformerSizes,
    tokens: int,
    plan: DenoiserPlan,
    copies: Copies = NO_COPIES,
    *,
    part: int | None = None,
) -> int:
    """As `block_elements`, of the attention half.

    What earlier groups attended to, k and v of one group, q too if it is held, and one or two
    chunks of the stream.
    """
    cut = plan.attention(sizes.kv_heads, is_whole=sizes.is_whole, norms_across=sizes.norms_across)
    chunk = longest_chunk(tokens, cut.last_tokens)
    repeats = sizes.heads // sizes.kv_heads
    # The new stream's rows serve, where there is one.
    held = 0 if sizes.makes_streams else cut.spans[-1][0] * repeats * sizes.head_dim
    group, last = ((stop - start) * sizes.head_dim for start, stop in (cut.spans[0], cut.spans[-1]))
    queries = repeats if cut.holds_query else 0
    # The first sample fetches out in its last group.
    before_out = copies.qkv + (copies.out if copies.is_batch else 0)
    # A chunk normed; where all features are computed at a time, its product too.
    normed = longest_chunk(tokens if part is None else part, cut.made_tokens)
    product, joined = sizes.qkv_dim, (queries + 2) * group if len(cut.spans) == 1 else group
    is_beside = sizes.is_whole and normed < tokens
    if sizes.makes_streams:  # q, k and v have a layer each
        product, joined, is_beside = sizes.dim, group, sizes.is_whole
    made = normed * (sizes.dim + (product if is_beside else 0))
    made += product_elements(sizes, plan, normed, sizes.dim, joined)
    if sizes.norms_across:
        made = normed * sizes.dim
        held_product = product_elements(sizes, plan, normed, sizes.dim, sizes.dim)
        if cut.keeps_rows:  # k as normed; or what k or v is written from
            made = max(made, held_product)
        else:  # q as made and as normed beside the rows; k's product outlives them
            made = (3 if cut.holds_query else 2) * made + held_product
    # q of a chunk beside what it attended to; or that joined; or that beside its projection.
    ends = 2 * sizes.dim
    shared = 2 if repeats == 1 else 2 * repeats + (2 if queries else 0)
    beside = product_elements(sizes, plan, chunk, sizes.dim, sizes.dim, is_written=False)
    attention = max(
        tokens * (held + (queries + 2) * group) + made + before_out,
        tokens * (held + (queries + shared) * last)
        + (chunk * ends + beside + copies.qkv + copies.out),
    )
    if repeats > 1:  # k and v as they are shared, and their copies for attention
        copied = (queries + 2 + 2 * repeats) * group
        # A chunk of an earlier group that is larger than the last one: normed rows beside q.
        earlier = (queries + shared) * group * tokens + chunk * (sizes.dim + group * repeats)
        attention = max(attention, tokens * (held + copied) + before_out)
        attention = max(attention, tokens * held + earlier + before_out)
    return attention


def feed_forward_elements(
    sizes: TransformerSizes, tokens: int, plan: DenoiserPlan, copies: Copies = NO_COPIES
) -> int:
    """As `block_elements`, of the feed-forward half.

    A chunk of the stream, of one hidden tensor, and of a column block of the other.
    """
    chunk = longest_chunk(tokens, plan.feed_tokens)
    beside = functools.partial(product_elements, sizes, plan, chunk)
    products = max(
        beside(sizes.dim, sizes.ffn_dim), beside(sizes.ffn_dim, sizes.dim, is_written=False)
    )
    held = chunk * (sizes.dim + sizes.ffn_dim) + 3 * copies.feed_forward
    if not sizes.is_gated:
        return held + products + (chunk * sizes.ffn_dim if sizes.is_whole else 0)
    columns = -(-sizes.ffn_dim // plan.feed_blocks(is_whole=sizes.is_whole))
    if sizes.is_whole and sizes.is_parallel:  # one projection gives both factors
        columns = 2 * sizes.ffn_dim
    block = max(products, chunk * columns + beside(sizes.dim, columns, is_written=False))
    # The first chunk has not fetched w2 where it holds that block.
    is_first = chunk == tokens and not copies.is_batch
    return max(held, held + block - (copies.feed_forward if is_first else 0))


def stock_peak_bytes(request: Request, *, has_copies: bool = False) -> int:
    """The peak of the host's own forward, in bytes; weights and kernel workspaces excluded.

    The peak is where a feed-forward holds four hidden tensors: in a main block, or in the second
    image refiner, which holds the embedding twice.

    Args:
        has_copies: as for `lean_peak_bytes`. The host holds one copy at a time. Few tokens peak
            where w3 multiplies, beside two hidden tensors.

    Source: JointTransformerBlock and patchify_and_embed in the host's comfy/ldm/lumina/model.py.
    """
    sizes = request.sizes
    row_bytes = request.batch * sizes.dim * request.dtype_bytes
    hidden_row_bytes = request.batch * sizes.ffn_dim * request.dtype_bytes
    copy_bytes = sizes.ffn_dim * sizes.dim * request.dtype_bytes if has_copies else 0

    def hidden_bytes(tokens: int) -> int:
        return 2 * tokens * hidden_row_bytes + max(2 * tokens * hidden_row_bytes, copy_bytes)

    image, text = request.refined
    others = text + request.reference_feature_tokens
    main = hidden_bytes(request.tokens) + 4 * request.tokens * row_bytes + request.rope_bytes
    refiner = hidden_bytes(image) + (5 * image + 2 * others) * row_bytes
    for control in request.controls:
        stream = request.image_tokens * row_bytes
        main += 2 * stream
        # Where its blocks follow one another, one more than with ours, which write in place.
        refiner += (control.refiner_streams + control.is_doubled) * stream
    # The host's copy of the latent, filled up to whole patches.
    padded = request.batch * request.image_tokens * sizes.patch_dim * request.dtype_bytes
    return max(main, refiner + 2 * request.rope_bytes) + _latent_and_text_bytes(request) + padded


def _latent_and_text_bytes(request: Request) -> int:
    """The caller holds these."""
    _, channels, height, width = request.latent_shape
    elements = channels * height * width + request.text_tokens * request.sizes.cap_dim
    elements += request.reference_tokens * request.sizes.patch_dim
    hints = sum(control.channels for control in request.controls) * height * width
    return (request.batch * elements + hints) * request.dtype_bytes
