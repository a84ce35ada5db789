"""The peak of encoding one prompt with Qwen3, as a formula, and the number of its weights."""

from __future__ import annotations

from dataclasses import dataclass

# The host computes text encoders in float32, whatever type their weights have.
COMPUTE_BYTES = 4


@dataclass(frozen=True)
class TextEncoderSizes:
    """The sizes of a Qwen3 text encoder; the defaults are Qwen3-4B's.

    hidden: width of the residual stream, in elements.
    ffn: width of the feed-forward's hidden tensors.
    """

    hidden: int = 2560
    ffn: int = 9728
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 151936

    @property
    def table(self) -> int:
        """Elements of the embedding table."""
        return self.vocabulary * self.hidden

    @property
    def largest_matrix(self) -> int:
        """Elements of the largest matrix of a layer."""
        return self.hidden * max(self.ffn, self.heads * self.head_dim)

    @property
    def parameters(self) -> int:
        """Elements of all weights."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        norms = 2 * self.hidden + 2 * self.head_dim
        layer = attention + 3 * self.hidden * self.ffn + norms
        return self.table + self.layers * layer + self.hidden


QWEN3_4B = TextEncoderSizes()


# Bytes held for each score by torch's math, the host's basic and a fused attention: the score, its
# softmax or the scaled score, and in math a byte that says whether it is masked.
MATH_SCORE, BASIC_SCORE, FUSED_SCORE = 9, 8, 0


def text_encoder_peak_bytes(
    tokens: int,
    sizes: TextEncoderSizes = QWEN3_4B,
    *,
    adds_in_place: bool = False,
    bytes_per_score: int = MATH_SCORE,
) -> int:
    """The peak of encoding one prompt in the host, in bytes; weights and workspaces excluded.

    The peak is in a feed-forward, which holds a matrix in float32. In long prompts it is in an
    attention that keeps scores.

    Source: Llama2_, MLP and Attention in the host's comfy/text_encoders/llama.py.

    Args:
        adds_in_place: a block writes its result over its input, as in hosts after 0.30.0. Without
            a host to ask, the plan counts the stream that this saves: 2 to 3 % too much, not less.
        bytes_per_score: torch's math, the host's basic attention, or a fused kernel for float32
            with a mask. Without a card to ask, the plan counts the most.

    Raises:
        ValueError: tokens < 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens must be >= 1, got {tokens}")
    rotary = 3 * sizes.head_dim
    masks = 2 * tokens**2
    streams = 4 - adds_in_place
    queries, shared = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    # The embedding, the stream twice (in place: once), the normed input and the tapped layer; two
    # hidden tensors, and the largest matrix or their product.
    feed_forward = tokens * ((streams + 1) * sizes.hidden + rotary + 2 * sizes.ffn)
    feed_forward += max(sizes.largest_matrix, tokens * sizes.ffn)
    # q, k and v for every head, and q scaled or the result; a fused kernel may pad the mask.
    copies = 3 if bytes_per_score == BASIC_SCORE else 4
    attention = tokens * (streams * sizes.hidden + rotary + copies * queries + 2 * shared)
    attention += 0 if bytes_per_score else tokens**2
    attention = COMPUTE_BYTES * attention + bytes_per_score * sizes.heads * tokens**2
    return max(COMPUTE_BYTES * feed_forward, attention) + COMPUTE_BYTES * masks
