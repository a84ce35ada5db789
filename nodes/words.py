"""Texts that the page can show in its own language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


class Words(str):
    """A text in English, with the key and the values by which the page says it in its own language.

    `Words("onDevice", "on $1", "cpu")` is the string "on cpu". The page's sentence is "onDevice" of
    our node in locales/<language>/main.json; the English one there is the template given here.

    key: of the sentence.
    values: in the order of their places $1, $2, ...; each a string or a `Words`.
    """

    key: str
    values: tuple[str, ...]
    _english: str

    def __new__(cls, key: str, english: str, *values: object) -> Words:
        texts = tuple(value if isinstance(value, Words) else str(value) for value in values)
        made = super().__new__(cls, re.sub(r"\$(\d)", lambda at: texts[int(at[1]) - 1], english))
        made.key, made.values, made._english = key, texts, english
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Words:  # as of a str: it never changes
        return self

    def __reduce__(self) -> tuple[type[Words], tuple[str, ...]]:  # a copy keeps its key
        return Words, (self.key, self._english, *self.values)


def with_words(made: dict[str, Any]) -> dict[str, Any]:
    """A dict for the page, with `words_in` it."""
    return {**made, "words": words_in(made)}


def words_in(value: Any) -> dict[str, list[Any]]:
    """Key and values of each `Words` in dicts, lists and tuples, by the English text.

    A list in place of a value is the key and the values of another text.
    """
    return {str(words): _told(words) for words in _found(value)}


def _told(words: Words) -> list[Any]:
    return [words.key, *(_told(v) if isinstance(v, Words) else v for v in words.values)]


def _found(value: Any) -> Iterator[Words]:
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, Words):
            yield inner
        elif isinstance(inner, dict | list | tuple):
            yield from _found(inner)
