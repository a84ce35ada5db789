"""Patches of other nodes between the blocks: they get what the host's own forward gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Stream:
    """The residual stream of a forward, [B, T, D], which each block writes over."""

    rows: torch.Tensor

    def leave_to_others(self) -> None:
        """Goes on in a copy where a patch keeps some of it, which the host does not write over."""
        count = getattr(torch._C, "_storage_Use_Count", None)  # torch has no public name for it
        storage = self.rows.untyped_storage()
        if count is None or count(storage._cdata) > 2:  # the rows, and `storage`
            self.rows = self.rows.clone()


def patches_of(transformer_options: Mapping[str, Any]) -> dict[str, list[Callable[..., Any]]]:
    """The patches of other nodes that the host's own forward calls after blocks."""
    found = transformer_options.get("patches", {})
    return {name: found[name] for name in ("noise_refiner", "double_block") if found.get(name)}


class Patched:
    """Calls patches after each block of a stack.

    Args:
        stream: no view of it may be held while they are called.
        first: the first token of the pictures that they get.
        text_tokens: the tokens before it that they get as text.
        given: what else they get.
        returns_text: they may return a text too.

    Memory: a copy of the pictures, as each block writes over its input.
    Source: NextDiT._forward and patchify_and_embed of the host's comfy/ldm/lumina/model.py.
    """

    def __init__(
        self,
        functions: Sequence[Callable[[dict[str, Any]], dict[str, Any]]],
        stream: Stream,
        first: int,
        text_tokens: int,
        given: dict[str, Any],
        *,
        returns_text: bool,
    ) -> None:
        self._functions, self._stream, self._first = functions, stream, first
        self._text_tokens, self._returns_text = text_tokens, returns_text
        self._given = {**given, "img_input": self._image.clone()}

    @property
    def _image(self) -> torch.Tensor:
        return self._stream.rows[:, self._first :]

    @property
    def _text(self) -> torch.Tensor:
        return self._stream.rows[:, : self._text_tokens]

    def __call__(self, index: int) -> None:
        for function in self._functions:
            self._call(function, index)
        self._stream.leave_to_others()

    def _call(self, function: Callable[[dict[str, Any]], dict[str, Any]], index: int) -> None:
        image, text = self._image, self._text
        out = function({**self._given, "img": image, "txt": text, "block_index": index})
        is_new_image = "img" in out and out["img"] is not image
        is_new_text = self._returns_text and "txt" in out and out["txt"] is not text
        new = out["img"] if is_new_image else None, out["txt"] if is_new_text else None
        del out, image, text
        if is_new_image and not self._returns_text:
            # The host goes on with the new tensor, and leaves what the patch got as it is.
            self._stream.leave_to_others()
        for value, target in zip(new, (self._image, self._text), strict=True):
            if value is not None:
                target.copy_(value)
