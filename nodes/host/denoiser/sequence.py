"""The tokens of a request in the host's order, and their embedding.

First all texts, then the features of reference pictures (SigLIP), then all pictures; the picture
that is drawn comes last, its text after those of the references.

Source: embed_cap, embed_all and patchify_and_embed of the host's NextDiT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import comfy.utils
import torch

from ...denoiser.cuts import DenoiserPlan, chunks
from ...denoiser.sizes import round_up
from .projections import projection


class Part(NamedTuple):
    """A run of tokens of one kind.

    given: a text [1 or B, L, C], features [1 or B, H, W, C], or a latent [1 or B, C, H, W]; None
        for padding alone.
    rows, columns: of its grid of tokens; a text has one row.
    tokens: with padding.
    start: its position on the first axis; a text counts from there.
    """

    given: torch.Tensor | None
    rows: int
    columns: int
    tokens: int
    start: int

    @property
    def filled(self) -> int:
        """Tokens before the padding."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Layout:
    """The parts of a request, by kind, each in the host's order.

    own_text_tokens: of the texts' tokens, those at the end that go with the drawn picture.
    """

    texts: Sequence[Part]
    features: Sequence[Part]
    pictures: Sequence[Part]
    own_text_tokens: int

    @property
    def text_tokens(self) -> int:
        return sum(part.tokens for part in self.texts)

    @property
    def feature_tokens(self) -> int:
        return sum(part.tokens for part in self.features)

    @property
    def picture_tokens(self) -> int:
        return sum(part.tokens for part in self.pictures)

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.feature_tokens + self.picture_tokens

    @property
    def lengths(self) -> tuple[int, ...]:
        """As `Request.lengths`."""
        return self.tokens, self.picture_tokens, self.text_tokens

    @property
    def drawn(self) -> Part:
        """The picture that is drawn."""
        return self.pictures[-1]

    def without_given(self) -> Layout:
        """The same sizes; what is embedded need not be held."""

        def sizes(parts: Sequence[Part]) -> list[Part]:
            return [part._replace(given=None) for part in parts]

        return replace(
            self,
            texts=sizes(self.texts),
            features=sizes(self.features),
            pictures=sizes(self.pictures),
        )

    @property
    def timed(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]] | tuple[None, None]:
        """The runs that take the timestep where the others take zero, of the pictures and of all.

        None without references. The host calls them timestep_zero_index.
        """
        if len(self.pictures) == 1:
            return None, None
        of_pictures = (self.picture_tokens - self.drawn.tokens, self.picture_tokens)
        of_texts = (self.text_tokens - self.own_text_tokens, self.text_tokens)
        return [of_pictures], [(self.tokens - self.drawn.tokens, self.tokens), of_texts]


def layout_of(
    model: Any,
    x: torch.Tensor,
    context: torch.Tensor,
    ref_latents: Sequence[torch.Tensor],
    ref_contexts: Sequence[torch.Tensor],
    siglip_feats: Sequence[torch.Tensor | None],
) -> Layout:
    """The layout of a request, arguments as of NextDiT._forward.

    Args:
        model: the host's NextDiT.
        x: latent filled up to whole patches, [B, 16, H, W].
        context: text features, [1 or B, L, text width].
        ref_latents: of reference pictures, [1 or B, 16, H, W], with whole patches.
        ref_contexts: a text for each of them, and more texts for the drawn picture.
        siglip_feats: features of each of them, [1 or B, H, W, width] or None.
    """
    texts: list[Part] = []
    features: list[Part] = []
    pictures: list[Part] = []
    has_references = len(ref_latents) > 0

    def add(latent: torch.Tensor, text: Any, seen: Any, start: int) -> int:
        """Adds a picture with what belongs to it; returns where the next one starts."""
        texts.append(_text(model, text, start))
        after = start + texts[-1].tokens
        if has_references and model.siglip_embedder is not None:
            after = start + (0 if text is None else text.shape[1])
            features.append(_features(model, seen, after + 2))
        rows, columns = (side // model.patch_size for side in latent.shape[-2:])
        padded = _padded(rows * columns, model)
        pictures.append(Part(latent, rows, columns, padded, after + 1))
        return after + 2

    start = 0
    for index, latent in enumerate(ref_latents):
        text, seen = (
            given[index] if index < len(given) else None for given in (ref_contexts, siglip_feats)
        )
        start = add(latent, text, seen, start)
    start = add(x, context, None, start)
    before = len(texts) - 1
    for text in ref_contexts[len(ref_latents) :] if has_references else ():
        texts.append(_text(model, text, start))
        start += 0 if text is None else text.shape[1]
    own = sum(part.tokens for part in texts[before:])
    return Layout(texts, features, pictures, own)


def _padded(tokens: int, model: Any) -> int:
    return round_up(tokens, model.pad_tokens_multiple or 1)


def _text(model: Any, text: torch.Tensor | None, start: int) -> Part:
    if text is None:
        return Part(None, 1, 0, model.pad_tokens_multiple, start)
    return Part(text, 1, text.shape[1], _padded(text.shape[1], model), start)


def _features(model: Any, seen: torch.Tensor | None, start: int) -> Part:
    if seen is None:
        return Part(None, 0, 0, model.pad_tokens_multiple, start)
    _, rows, columns, _ = seen.shape
    return Part(seen, rows, columns, _padded(rows * columns, model), start)


def embed(model: Any, x: torch.Tensor, layout: Layout, plan: DenoiserPlan) -> torch.Tensor:
    """All tokens of a request in one buffer, [B, T, D].

    Args:
        x: the latent; its batch and type are the buffer's.
    """
    batch = x.shape[0]
    stream = x.new_empty(batch, layout.tokens, model.dim)
    first = 0
    for part in layout.texts:
        run = stream[:, first : first + part.tokens]
        if part.given is not None:
            text = model.cap_embedder(part.given)
            run[:, : part.filled] = comfy.utils.repeat_to_batch_size(text, batch)
            del text
        _fill(run, part, lambda: model.cap_pad_token)
        first += part.tokens
    for part in layout.features:
        run = stream[:, first : first + part.tokens]
        if part.given is not None:
            # In this order of elements, as the host has it.
            seen = part.given.permute(0, 3, 1, 2).reshape(len(part.given), part.filled, -1)
            seen = model.siglip_embedder(seen)
            run[:, : part.filled] = comfy.utils.repeat_to_batch_size(seen, batch)
            del seen
        _fill(run, part, lambda: model.siglip_pad_token)
        first += part.tokens
    with ExitStack() as until:
        embedder = projection(model.x_embedder, stream, until)
        for part in layout.pictures:
            run = stream[:, first : first + part.tokens]
            patches = _patches(model, comfy.utils.repeat_to_batch_size(part.given, batch))
            for sample in range(batch):
                for start, stop in chunks(part.filled, plan.chunk_tokens):
                    run[sample, start:stop] = embedder(patches[sample, start:stop])
            del patches
            _fill(run, part, lambda: model.x_pad_token)
            first += part.tokens
    return stream


def _fill(run: torch.Tensor, part: Part, token: Callable[[], torch.Tensor]) -> None:
    if part.tokens > part.filled:
        run[:, part.filled :] = token().to(run)


def _patches(model: Any, latent: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H / 2 * W / 2, 2 * 2 * C]"""
    batch, channels, height, width = latent.shape
    patch = model.patch_size
    patches = latent.view(batch, channels, height // patch, patch, width // patch, patch)
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
