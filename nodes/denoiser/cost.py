"""What a step of the denoiser costs: launches, arithmetic and traffic, and modelled seconds.

A model, not a measurement: counts by formula, which tests hold to what fake CUDA tensors show, and
rates from data sheets. What comes before and after the blocks is not in it, as it is alike for each
plan. Nor are caches, and products too small for a card, as of one head ("smallest"): its time is
modelled too low.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cuts import DenoiserPlan, chunk_count
from .sizes import MODULATION_DIM, Request, TransformerSizes

# Norm and factors of a chunk; norm, factors and sum of a result.
NORMED, ADDED = 2, 3
# Reads and writes of rows for them.
NORMED_ROWS, ADDED_ROWS = 4, 7
# Of a block's modulation: one product, 1 + two scales, the tanh of two gates.
MODULATION = 5
# Of the host's block, which takes the whole batch at once.
HOST_LAUNCHES = 26
# Share of a data sheet's rates that large operations reach: an H100 takes about 3 ms for a block at
# 1024x1024, where the data sheet has 2.2.
REACHED = 0.7
# For one thread to issue a launch: 5.8 ms for the 554 of a block.
LAUNCH_S = 10e-6
# Of the weights that are streamed, those whose copies hide behind nothing where each is copied by
# itself: qkv, w2 and w3 wait for the last product before they are needed. Of a block that is
# streamed whole; less where qkv has pages.
WAITING = 0.68


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    flops_per_s: dense products in bfloat16, added in float32.
    bytes_per_s: of its memory.
    copy_bytes_per_s: pinned copies from RAM, 80 % of the PCIe link's rate.
    launch_s: for one thread of its computer to issue a launch.
    multiprocessors: on the card.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float
    copy_bytes_per_s: float
    launch_s: float = LAUNCH_S
    multiprocessors: int = 0


# By data sheet: memory, multiprocessors, boost clock, PCIe link. Of products, the 3060 and the 4060
# do 512 operations per multiprocessor and clock, as NVIDIA's papers on Ampere's GA102 and on Ada
# have it for their families: 28 x 1.777 GHz, PCIe 4.0 x16; 24 x 2.46 GHz, PCIe 4.0 x8.
RTX_3060 = Card("RTX 3060 12GB", 25.5e12, 360e9, 25e9, multiprocessors=28)
RTX_4060 = Card("RTX 4060", 30.2e12, 272e9, 12.5e9, multiprocessors=24)
# The paper on Ada, appendix A; PCIe 4.0 x16.
RTX_4090 = Card("RTX 4090", 165.2e12, 1008e9, 25e9, multiprocessors=128)
# H100 SXM5, half of what the data sheet has with sparsity; PCIe 5.0 x16.
H100 = Card("H100 SXM", 989.4e12, 3350e9, 50e9, multiprocessors=132)
CARDS = (RTX_3060, RTX_4060, RTX_4090, H100)


@dataclass(frozen=True)
class Work:
    """What the card is asked to do.

    launches: operations on the card.
    flops: multiplications and additions of products and attention.
    moved_bytes: read and written by all operations.
    row_bytes: of them, by operations on rows, and weights that products read; the others hide
        behind the arithmetic of the product that moves them.
    """

    launches: int = 0
    flops: int = 0
    moved_bytes: int = 0
    row_bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.launches + other.launches,
            self.flops + other.flops,
            self.moved_bytes + other.moved_bytes,
            self.row_bytes + other.row_bytes,
        )

    def __mul__(self, count: int) -> Work:
        return Work(
            self.launches * count,
            self.flops * count,
            self.moved_bytes * count,
            self.row_bytes * count,
        )


NO_WORK = Work()


def seconds(work: Work, card: Card, *, streamed_bytes: int = 0, prefetches: bool = False) -> float:
    """Modelled time: the longest of three things that happen at a time.

    - One thread issues the launches.
    - The card computes: arithmetic, then what operations on rows and weights move.
    - Weights that do not stay on the card are copied there.

    Args:
        prefetches: a block is copied while the one before computes, so that all copies hide, as
            long as the CPU is ahead of the card by a block. Else the card waits for some of them,
            see `WAITING`.
    """
    issued = work.launches * card.launch_s
    computed = work.flops / card.flops_per_s + work.row_bytes / card.bytes_per_s
    copied = streamed_bytes / card.copy_bytes_per_s
    waited = 0 if prefetches else WAITING * copied
    return max(issued, computed / REACHED + waited, copied)


def step_work(request: Request, plan: DenoiserPlan | None) -> Work:
    """Work of all blocks, refiners and ControlNets in one step; plan None: the host's own blocks.

    The text's refiners count as if they were modulated.
    """
    sizes = request.sizes
    refined = (*request.refined, request.reference_feature_tokens)
    refiners = sum((block_work(request, plan, tokens=each) for each in refined if each), NO_WORK)
    work = block_work(request, plan) * sizes.layers + refiners * sizes.refiner_layers
    beside = sum(control.blocks for control in request.controls)
    return work + block_work(request, plan, tokens=request.image_tokens) * beside


def block_work(request: Request, plan: DenoiserPlan | None, *, tokens: int = 0) -> Work:
    """Work of one block for the whole batch; plan None: the host's own.

    Args:
        tokens: of a sample; 0 for those of a main block.
    """
    sizes, tokens = request.sizes, tokens or request.tokens
    modulation = _Moved(request.dtype_bytes, MODULATION)
    modulation.product(request.batch, MODULATION_DIM, 4 * sizes.dim)
    if plan is None:
        return modulation.work() + _host_work(request, tokens)
    halves = _attention_work(request, tokens, plan) + _feed_forward_work(request, tokens, plan)
    return modulation.work() + halves * request.batch


class _Moved:
    """Adds up work by elements of `dtype_bytes`."""

    def __init__(self, dtype_bytes: int, launches: int) -> None:
        self._dtype_bytes, self._launches = dtype_bytes, launches
        self._flops = self._rows = self._hidden = 0

    def rows(self, elements: int) -> None:
        """Elements that operations on rows read or write."""
        self._rows += elements

    def product(
        self, rows: int, inner: int, columns: int, *, calls: int = 1, parts: int = 1
    ) -> None:
        """[rows, inner] x [inner, columns]; each call reads the weight, each part the rows."""
        self._flops += 2 * rows * inner * columns
        self._rows += calls * inner * columns
        self._hidden += rows * (parts * inner + columns)

    def attention(self, queries: int, keys: int, width: int, *, calls: int = 1) -> None:
        """[queries, width] to k and v [keys, width], which are read at each of the calls."""
        self._flops += 4 * queries * keys * width
        self._hidden += 2 * queries * width + 2 * calls * keys * width

    def work(self) -> Work:
        row_bytes = self._rows * self._dtype_bytes
        moved = row_bytes + self._hidden * self._dtype_bytes
        return Work(self._launches, self._flops, moved, row_bytes)


def _host_work(request: Request, tokens: int) -> Work:
    """Source: JointTransformerBlock in the host's comfy/ldm/lumina/model.py."""
    sizes, total = request.sizes, request.batch * tokens
    moved = _Moved(request.dtype_bytes, HOST_LAUNCHES - MODULATION)
    moved.rows(2 * (NORMED_ROWS + ADDED_ROWS) * total * sizes.dim)
    moved.product(total, sizes.dim, sizes.qkv_dim)
    shared = sizes.kv_heads * sizes.head_dim
    # Norm and rotary embedding into new tensors; copies of k and v.
    moved.rows(2 * total * (sizes.dim + shared) + _table(request, tokens))
    moved.rows(2 * total * (shared + sizes.dim))
    for _ in range(request.batch):
        moved.attention(tokens, tokens, sizes.dim)
    moved.product(total, sizes.dim, sizes.dim)
    for inner, columns in 2 * [(sizes.dim, sizes.ffn_dim)] + [(sizes.ffn_dim, sizes.dim)]:
        moved.product(total, inner, columns)
    moved.rows((2 + 3) * total * sizes.ffn_dim)  # silu; the product of both
    return moved.work()


def _table(request: Request, tokens: int) -> int:
    """Elements that reading the rotary table of a run of tokens moves."""
    return 8 * tokens * request.sizes.head_dim // request.dtype_bytes


def _attention_work(request: Request, tokens: int, plan: DenoiserPlan) -> Work:
    sizes = request.sizes
    cut = plan.attention(sizes.kv_heads, is_whole=sizes.is_whole)
    makes, ends = chunk_count(tokens, cut.made_tokens), chunk_count(tokens, cut.last_tokens)
    moved = _Moved(request.dtype_bytes, attention_launches(sizes, tokens, plan))
    repeats, width = sizes.heads // sizes.kv_heads, sizes.dim
    read = _table(request, tokens)
    table = read * (1 if plan.holds_rope else 3)  # gathered: two more
    for first, last in cut.spans:
        is_last = last == sizes.kv_heads
        shared = (last - first) * sizes.head_dim
        queries = shared * repeats
        made = 2 * shared + (queries if cut.holds_query else 0)
        calls = ends if is_last else chunk_count(tokens, cut.earlier_tokens)
        moved.rows(NORMED_ROWS * tokens * width)
        moved.product(tokens, width, made, calls=makes, parts=cut.products)
        moved.rows(2 * tokens * (made - shared) + table + read * cut.holds_query)
        if not cut.holds_query:
            moved.rows(NORMED_ROWS * tokens * width)
            moved.product(tokens, width, queries, calls=calls)
            moved.rows(2 * tokens * queries + table)
        if repeats > 1:
            moved.rows(2 * tokens * (shared + queries))
        moved.attention(tokens, tokens, queries, calls=calls)
        if len(cut.spans) > 1:  # what waits is written; in the end it is joined
            moved.rows(2 * tokens * (width if is_last else queries))
    moved.product(tokens, width, width, calls=ends)
    moved.rows(ADDED_ROWS * tokens * width)
    return moved.work()


def _feed_forward_work(request: Request, tokens: int, plan: DenoiserPlan) -> Work:
    sizes = request.sizes
    moved = _Moved(request.dtype_bytes, feed_forward_launches(sizes, tokens, plan))
    calls = chunk_count(tokens, plan.feed_tokens)
    moved.rows((NORMED_ROWS + ADDED_ROWS) * tokens * sizes.dim)
    for inner, columns in 2 * [(sizes.dim, sizes.ffn_dim)] + [(sizes.ffn_dim, sizes.dim)]:
        moved.product(tokens, inner, columns, calls=calls)
    moved.rows((2 + 3) * tokens * sizes.ffn_dim)
    return moved.work()


def block_launches(request: Request, plan: DenoiserPlan) -> int:
    """Launches of one main block for the whole batch.

    For a host that fuses norm and rope, plain weights, own key heads and bfloat16 or float32.
    Quantised layers quantise rows, shared heads are repeated and float16 is made finite besides.
    """
    halves = attention_launches, feed_forward_launches
    each = sum(half(request.sizes, request.tokens, plan) for half in halves)
    return MODULATION + request.batch * each


def attention_launches(sizes: TransformerSizes, tokens: int, plan: DenoiserPlan) -> int:
    """Launches of the attention half for one sample."""
    cut = plan.attention(sizes.kv_heads, is_whole=sizes.is_whole)
    groups = len(cut.spans)
    table = 0 if plan.holds_rope else 1
    rope = 1 + cut.holds_query
    if not plan.holds_rope:  # a table for each piece
        rope = (rope + 1) * -(-tokens // plan.rope_tokens(sizes.dim, sizes.head_dim))
    each = chunk_count(tokens, cut.made_tokens) * (NORMED + cut.products) + rope
    attended = 1 if cut.holds_query else NORMED + 2 + table + 1
    result = 1 + ADDED + (2 if groups > 1 else 0)
    earlier = (groups - 1) * chunk_count(tokens, cut.earlier_tokens) * (attended + 1)
    return groups * each + earlier + chunk_count(tokens, cut.last_tokens) * (attended + result)


def feed_forward_launches(sizes: TransformerSizes, tokens: int, plan: DenoiserPlan) -> int:
    """Launches of the feed-forward half for one sample."""
    blocks = plan.feed_blocks(is_whole=sizes.is_whole)
    runs = chunk_count(tokens, plan.feed_tokens)
    return runs * (NORMED + 2 + 2 * blocks + 1 + ADDED)
