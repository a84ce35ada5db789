"""Reads the vocabulary once for all tests of the loader."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest


@functools.cache
def _read_once() -> Any:
    from transformers import Qwen2Tokenizer

    return staticmethod(functools.cache(Qwen2Tokenizer.from_pretrained))


@pytest.fixture(scope="module", autouse=True)
def _one_tokenizer() -> Iterator[None]:
    """More than half of loading a small model is the tokenizer, the same one for all of them."""
    from transformers import Qwen2Tokenizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen2Tokenizer, "from_pretrained", _read_once())
        yield
