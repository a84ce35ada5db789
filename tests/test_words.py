"""Texts for the page: English for everyone else, with the key and values of the page's sentence."""

from __future__ import annotations

import copy
import json
import pickle

from pack.nodes.words import Words, with_words

INNER = Words("allocator", "torch's $1 allocator", "cuda")
OUTER = Words("both", "$2: $1, and pages $1", INNER, 3)


def test_a_text_is_its_english():
    assert OUTER == "3: torch's cuda allocator, and pages torch's cuda allocator"
    assert Words("price", "$1", "$2 and \\1") == "$2 and \\1", "a value is no template"
    assert json.dumps([INNER]) == '["torch\'s cuda allocator"]'


def test_the_page_gets_key_and_values_of_each_text_wherever_it_is():
    made = {"name": INNER, "rows": [(1, None, OUTER), {"of": "a name"}], "again": INNER}
    assert with_words(made) == {
        **made,
        "words": {INNER: ["allocator", "cuda"], OUTER: ["both", ["allocator", "cuda"], "3"]},
    }
    assert with_words({"name": "plain"})["words"] == {}


def test_a_copy_keeps_the_key():
    """The probe's record is copied with dataclasses.asdict, which copies its strings too."""
    for same in (copy.deepcopy(OUTER), copy.copy(OUTER), pickle.loads(pickle.dumps(OUTER))):
        assert (same, same.key, same.values) == (OUTER, "both", (INNER, "3"))
        assert with_words({"a": same}) == with_words({"a": OUTER})
